"""The kernels' tests that need Triton's interpreter: a child runs those of several files, as it starts for seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton_harness import INTERPRETED, pass_under_the_interpreter

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="this is the parent's"),
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize(
    ("marks", "at_least"),
    [
        pytest.param("not slow", {"attention_rows": 43, "moe_gate": 6}, id="attention"),
        pytest.param("not slow", {"token_log_probs": 30, "score": 22, "moe_routing": 23}, id="head and routing"),
        pytest.param("not slow", {"moe": 23, "moe_clamped": 13}, id="experts", marks=pytest.mark.slow),
        pytest.param("slow", {"attention_rows": 8, "score": 12}, id="slow", marks=pytest.mark.slow),
    ],
)
def test_under_the_interpreter(marks, at_least):
    folder = Path(__file__).parent
    pass_under_the_interpreter({folder / f"test_{name}.py": number for name, number in at_least.items()}, marks)
