"""``cggr::gradient_rows``: the rows of the loss, and others that carry gradient, in one set of slots."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cggr_compile.ops  # noqa: F401  (registers)

ops = torch.ops.cggr


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_gradient_rows(data: st.DataObject) -> None:
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    bits = st.lists(st.booleans(), min_size=length, max_size=length)
    loss = torch.tensor([data.draw(bits) for _ in range(batch)])
    extra = torch.tensor([data.draw(bits) for _ in range(batch)])
    most = data.draw(st.integers(int(loss.sum(1).max()), length))
    slots = data.draw(st.integers(most, length))
    rows, keep = ops.pack_rows(loss, most)
    found, kept, places, dropped = ops.gradient_rows(rows, keep, extra, slots)
    assert found.shape == kept.shape == (batch, slots) and places.shape == rows.shape
    missing = 0
    for i in range(batch):
        wanted = loss[i].nonzero().flatten().tolist()
        more = (extra[i] & ~loss[i]).nonzero().flatten().tolist()
        room = slots - len(wanted)
        assert found[i][kept[i]].tolist() == sorted(wanted + more[:room])
        assert len(set(found[i].tolist())) == slots and not kept[i].logical_not().int().diff().lt(0).any()
        assert torch.equal(found[i][places[i]][keep[i]], rows[i][keep[i]])
        missing += max(0, len(more) - room)
    assert dropped == missing
    assert ((places >= 0) & (places < max(slots, 1))).all()


def test_no_row_and_all_rows() -> None:
    none, every = torch.zeros(2, 4, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    rows, keep = ops.pack_rows(none, 2)
    assert not ops.gradient_rows(rows, keep, none, 3)[1].any()
    found, kept, places, dropped = ops.gradient_rows(*ops.pack_rows(every, 4), every, 4)
    assert torch.equal(found, torch.arange(4).expand(2, 4)) and kept.all() and dropped == 0
    assert torch.equal(places, found)
