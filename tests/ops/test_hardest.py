"""The hardest candidates, per sequence and of a batch; slots and weights of any selection."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cggr_compile.ops  # noqa: F401  (registers)

ops = torch.ops.cggr


def make_case(batch, length, ties, seed):
    torch.manual_seed(seed)
    scores = torch.randint(0, ties + 1, (batch, length)).float() if ties else torch.rand(batch, length)
    return scores, torch.rand(batch, length) > torch.rand(1)


CASES = st.builds(make_case, st.integers(1, 4), st.integers(1, 17), st.integers(0, 3), st.integers(0, 999))


def chosen(mask):
    return [row.nonzero().flatten().tolist() for row in mask]


@settings(max_examples=60, deadline=None)
@given(CASES, st.integers(1, 17))
def test_hardest(case, slots):
    scores, valid = case
    got = chosen(ops.hardest(scores, valid, slots))
    for row, allowed in enumerate(chosen(valid)):
        assert got[row] == sorted(sorted(allowed, key=lambda i: (-scores[row, i].item(), i))[:slots])


@settings(max_examples=80, deadline=None)
@given(CASES, st.integers(0, 4), st.integers(0, 5), st.integers(0, 5))
def test_hardest_of_batch(case, least, more, room):
    scores, valid = case
    slots = max(1, least + more)
    cap = slots + room
    got = chosen(ops.hardest_of_batch(scores, valid, slots, cap, least))
    ranks = [
        (rank >= least, -scores[row, i].item() if rank >= least else 0.0, row, i)
        for row, allowed in enumerate(chosen(valid))
        for rank, i in enumerate(sorted(allowed, key=lambda i: (-scores[row, i].item(), i))[:cap])
    ]
    best = sorted(ranks)[: slots * len(scores)]
    assert got == [sorted(i for *_, r, i in best if r == row) for row in range(len(scores))]


def test_scores_that_are_not_finite_come_last():
    scores = torch.tensor([[torch.nan, 2.0, torch.inf, -torch.inf, 1.0]])
    valid = torch.tensor([[True, True, True, True, True]])
    assert chosen(ops.hardest(scores, valid, 2)) == [[1, 4]]
    assert chosen(ops.hardest_of_batch(scores, valid, 4, 5, 0)) == [[0, 1, 2, 4]]
    mask, p = ops.stratified_sample(scores, valid, torch.tensor([0, 0]), 5, 2)
    assert mask.all() and (p == 1).all()


@settings(max_examples=60, deadline=None)
@given(CASES, st.integers(0, 5))
def test_pack_rows(case, room):
    _, mask = case
    length = mask.shape[1]
    slots = min(length, max(1, int(mask.sum(1).max())) + room)
    rows, keep = ops.pack_rows(mask, slots)
    assert rows.shape == keep.shape == (len(mask), slots) and rows.dtype == torch.int64
    for row, used in enumerate(chosen(mask)):
        assert len(set(rows[row].tolist())) == slots
        assert rows[row][keep[row]].tolist() == used and keep[row, : len(used)].all()


def test_row_weights():
    valid = torch.tensor([[True, True, True, False], [True, True, False, False]])
    rows, keep = ops.pack_rows(torch.tensor([[True, False, True, False], [False, True, False, False]]), 2)
    p = torch.tensor([[0.5, 0.5, 0.25, 0.0], [0.2, 0.8, 0.0, 0.0]])
    assert ops.row_weights(rows, keep, valid, p).tolist() == [[2.0, 4.0], [1.25, 0.0]]
    torch.testing.assert_close(ops.row_weights(rows, keep, valid, None), torch.tensor([[5 / 3, 5 / 3], [5 / 3, 0.0]]))
    nothing = ops.row_weights(rows, torch.zeros_like(keep), torch.zeros_like(valid), None)
    assert (nothing == 0).all()
