"""``cggr::context_distance``: the positions in front of rows of the loss, against a loop over positions."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cggr_compile.ops  # noqa: F401  (registers)

ops = torch.ops.cggr


def by_loop(loss, starts, real, reach):
    """The definition, a position at a time."""
    length = len(loss)
    found = []
    for i in range(length):
        distance = length
        for row in range(i, min(i + reach, length - 1) + 1):
            if row > i and starts is not None and starts[row]:
                break
            if loss[row]:
                distance = row - i if row == i or real is None or real[i] else length
                break
        found.append(distance)
    return found


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_context_distance(data: st.DataObject) -> None:
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    rare = st.sampled_from([False, False, False, True])

    def mask(rows: int, entry: st.SearchStrategy[bool]) -> torch.Tensor:
        return torch.tensor([data.draw(st.lists(entry, min_size=length, max_size=length)) for _ in range(rows)])

    loss = mask(batch, rare)
    starts = mask(data.draw(st.sampled_from([1, batch])), rare) if data.draw(st.booleans()) else None
    real = ~mask(batch, rare) if data.draw(st.booleans()) else None
    reach = data.draw(st.integers(1, 2 * length))
    found = ops.context_distance(loss, starts, real, reach)
    shared = None if starts is None else starts.expand(batch, -1)
    for i in range(batch):
        arguments = (None if mask is None else mask[i].tolist() for mask in (shared, real))
        assert found[i].tolist() == by_loop(loss[i].tolist(), *arguments, reach)


def test_a_span_overlapping_windows_and_the_first_position() -> None:
    loss = torch.tensor([[0, 0, 0, 0, 1, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    assert ops.context_distance(loss, None, None, 3).tolist() == [
        [10, 3, 2, 1, 0, 2, 1, 0, 0, 10],
        [0, *([10] * 9)],
    ]
    starts = torch.tensor([[0, 0, 0, 1, 0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    assert ops.context_distance(loss, starts, None, 3)[0].tolist() == [10, 10, 10, 1, 0, 10, 10, 0, 0, 10]
