"""The cost model's times are near measured ones."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import cost_model


@pytest.mark.slow
def test_ratios_are_within_a_tenth(capsys):
    assert cost_model.main(["--shapes", "1b-8x1024"]) == 0
    assert "3 of 3 within 10 %" in capsys.readouterr().out


def test_measured_steps_are_those_of_the_page():
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    for row in cost_model.MEASURED:
        for halves in (row.dense, *row.arms.values()):
            assert " / ".join(map(str, halves)) in page or " | ".join(map(str, halves)) in page
