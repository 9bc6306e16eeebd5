"""Shapes, and how often we compile."""

from __future__ import annotations

import math

import pytest
import torch
from models import PlainLM, backend, compiled, make_batch
from reference import assert_same, assert_zero, backward, hf_reference
from training import RATIO, check_against_reference, picks, selected


@pytest.mark.slow
def test_shapes_and_compilations() -> None:
    model = PlainLM()
    compiled(model, min_tokens_ratio=RATIO)
    shapes = [(2, 16), (3, 16), (2, 24), (3, 24), (2, 16), (3, 24), (1, 16)]
    graphs = []
    for size, seq in shapes:
        check_against_reference(model, make_batch(size, seq))
        assert tuple(selected(model).shape) == (size, math.ceil(RATIO * seq))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert all(later <= n + 1 for n, later in enumerate(graphs)), graphs
    assert graphs[3] == graphs[5], f"a shape seen before was compiled again: {graphs}"
    assert graphs[-1] <= 5, graphs
    assert not torch._dynamo.utils.counters["graph_break"]


def test_steps_do_not_recompile() -> None:
    model, batch = PlainLM(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert sum(losses[3:]) < sum(losses[:3])


def test_long_sequence_slots_are_exact() -> None:
    """ceil(ratio * S) by integer arithmetic: 0.1 * 30 is 3, not 4."""
    model = PlainLM()
    compiled(model, min_tokens_ratio=0.1)
    model(**make_batch(1, 30, ignored=False)).loss.backward()
    assert tuple(selected(model).shape) == (1, 3)


@pytest.mark.parametrize("seq", [1, 2])
def test_very_short_sequences(seq: int) -> None:
    model, batch = PlainLM(), make_batch(2, seq, ignored=False)
    compiled(model, min_tokens_ratio=RATIO)
    got = backward(model, model(**batch).loss)
    if seq == 1:
        assert_zero(got)
    else:  # position 0 attends to itself alone: its query and key gradients are nothing but rounding
        assert_same(got, hf_reference(model, batch, picks(model)), tolerance=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [{"fullgraph": True}, {"dynamic": False}, pytest.param({"dynamic": True}, marks=pytest.mark.slow)],
    ids=str,
)
def test_arguments_of_torch_compile(arguments: dict[str, bool]) -> None:
    model = PlainLM()
    options = {"min_tokens_ratio": RATIO, "compiler": "eager", "fallback": "error"}
    model.compile(backend=backend(), options=options, **arguments)
    for size, seq in [(2, 16), (2, 20)]:
        check_against_reference(model, make_batch(size, seq))
