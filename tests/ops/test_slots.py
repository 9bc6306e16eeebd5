"""``cggr::gradient_rows``: the rows of the loss, and others that carry gradient, in one set of slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cggr_compile.ops  # noqa: F401  (registers)

ops = torch.ops.cggr


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_gradient_rows(data: st.DataObject) -> None:
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    bits = st.lists(st.booleans(), min_size=length, max_size=length)
    loss = torch.tensor([data.draw(bits) for _ in range(batch)])
    extra = torch.tensor([data.draw(bits) for _ in range(batch)]) if data.draw(st.booleans()) else None
    far = st.lists(st.integers(0, length), min_size=length, max_size=length)
    distance = torch.tensor([data.draw(far) for _ in range(batch)]) if data.draw(st.booleans()) else None
    most = data.draw(st.integers(int(loss.sum(1).max()), length))
    slots = data.draw(st.integers(most, length))
    rows, keep = ops.pack_rows(loss, most)
    found, kept, places, counts = ops.gradient_rows(rows, keep, extra, distance, slots, length)
    assert found.shape == kept.shape == (batch, slots) and places.shape == rows.shape
    missing = [0, 0]
    for i in range(batch):
        wanted = loss[i].nonzero().flatten().tolist()
        more = [j for j in range(length) if extra is not None and extra[i, j] and not loss[i, j]]
        others = set(range(length)) - {*wanted, *more}
        context = [j for j in others if distance is not None and 0 < distance[i, j] < length]
        context.sort(key=lambda j: (int(distance[i, j]), j))
        chosen = [*wanted, *more, *context][:slots]
        assert found[i][kept[i]].tolist() == sorted(chosen)
        assert len(set(found[i].tolist())) == slots and not kept[i].logical_not().int().diff().lt(0).any()
        assert torch.equal(found[i][places[i]][keep[i]], rows[i][keep[i]])
        missing[0] += len(set(more) - set(chosen))
        missing[1] += len(set(context) - set(chosen))
    assert counts.tolist() == [int(kept.sum()), *missing]
    assert ((places >= 0) & (places < max(slots, 1))).all()


def test_no_row_and_all_rows() -> None:
    none, every = torch.zeros(2, 4, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    rows, keep = ops.pack_rows(none, 2)
    assert not ops.gradient_rows(rows, keep, none, None, 3, 4)[1].any()
    found, kept, places, counts = ops.gradient_rows(*ops.pack_rows(every, 4), every, None, 4, 4)
    assert torch.equal(found, torch.arange(4).expand(2, 4)) and kept.all() and counts.tolist() == [8, 0, 0]
    assert torch.equal(places, found)


@pytest.mark.parametrize("slots", [3, 4, 5])
def test_context_is_dropped_before_what_is_trained_and_the_farthest_first(slots: int) -> None:
    rows, keep = ops.pack_rows(torch.tensor([[0, 0, 0, 0, 1, 0, 0, 1]], dtype=torch.bool), 2)
    extra = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    distance = torch.tensor([[8, 3, 2, 1, 0, 2, 1, 0]])
    found, kept, _, counts = ops.gradient_rows(rows, keep, extra, distance, slots, 8)
    taken = [4, 7, 6, 3, 2][:slots]
    assert kept.all() and found[0].tolist() == sorted(taken)
    assert counts.tolist() == [slots, 0, 7 - slots]
