"""Blocks of positions: which are drawn, how likely, and what they weigh."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_inclusion import SHAPES, expected, make_case

import cggr_compile.ops  # noqa: F401  (registers)

span_sample = torch.ops.cggr.span_sample


def state(step=0, seed=0):
    return torch.tensor([seed, step])


def blocks_of(scores, valid, size):
    """The blocks as lists of positions, with their mean scores and whether they have a candidate."""
    spans = [list(range(at, min(at + size, valid.shape[1]))) for at in range(0, valid.shape[1], size)]
    has = torch.stack([valid[:, span].any(1) for span in spans], 1)
    means = torch.zeros(has.shape, dtype=torch.float64)
    for row in range(len(valid)):
        for index, span in enumerate(spans):
            of_span = scores[row, span][valid[row, span]].double()
            means[row, index] = of_span.mean() if len(of_span) else 0.0
    return spans, means, has


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), SHAPES, st.floats(0.02, 1.0), st.integers(1, 50), st.integers(0, 999))
def test_whole_blocks_by_their_mean_score(batch, length, shape, ratio, span, seed):
    scores, valid = make_case(batch, length, shape, seed)
    slots = max(1, round(ratio * length))
    mask, p = span_sample(scores, valid, state(seed), slots, None, span)
    number = math.ceil(slots / span)
    size = slots // number
    spans, means, has = blocks_of(scores, valid, size)
    want = expected(means, has, number)
    torch.testing.assert_close(
        p, torch.where(valid, want.repeat_interleave(size, 1)[:, :length], 0.0).float(), atol=2e-4, rtol=2e-4
    )
    chosen = torch.stack([mask[:, span].any(1) for span in spans], 1)
    assert torch.equal(mask, valid & chosen.repeat_interleave(size, 1)[:, :length]), "every candidate of a block"
    assert torch.equal(chosen.sum(1), has.sum(1).clamp(max=number)) and (mask.sum(1) <= slots).all()
    mask, p = span_sample(scores, valid, state(seed), slots, min(length, slots + 3), span)
    assert (mask.sum(1) <= slots + 3).all() and not (mask & ~valid).any(), "over the batch, the cap holds"
    assert not (mask & (p == 0)).any()


def test_blocks_of_the_size_that_was_asked_for():
    for slots, span, size in ((512, 64, 64), (100, 64, 50), (20, 64, 20), (65, 64, 32), (6, 1, 1)):
        mask, p = span_sample(None, torch.ones(1, 1000, dtype=torch.bool), state(), slots, None, span)
        number = math.ceil(slots / span)
        first = torch.nonzero(mask[0]).flatten().view(-1, size)[:, 0] if 1000 % size == 0 else None
        assert int(mask.sum()) in (number * size, (number - 1) * size + 1000 % size)
        assert first is None or (first % size == 0).all()
        torch.testing.assert_close(p[0, :size], torch.full((size,), number / math.ceil(1000 / size)))


@pytest.mark.parametrize("cap", [None, 9])
@pytest.mark.parametrize("scored", [True, False])
def test_unbiased(cap, scored):
    """The weighted sum of any losses, over many selections; the last block is shorter, some labels are missing."""
    torch.manual_seed(0)
    scores, valid = (torch.rand(2, 14) * 3).exp(), torch.ones(2, 14, dtype=torch.bool)
    valid[0, [1, 6, 7, 8]], valid[1, :3] = False, False
    losses, rounds, many = torch.randn(2, 14, dtype=torch.float64) + 1.0, 60, 40
    estimates, counts, p = [], torch.zeros(2, 14, dtype=torch.float64), None
    for step in range(rounds * many // 10):
        mask, p = span_sample(scores if scored else None, valid, state(step), 6, cap, 3)
        counts += mask
        estimates.append((losses[mask] / p[mask].double()).sum())
    found, draws = torch.stack(estimates), len(estimates)
    error = found.std() / draws**0.5
    assert abs(found.mean() - losses[valid].sum()) < 4 * error, (found.mean(), losses[valid].sum(), error)
    assert (counts / draws - p).abs().max() < 4 * 0.5 / draws**0.5
    assert (p[valid] > 0).all() and (p[~valid] == 0).all()


def test_the_order_inside_of_a_block_does_not_matter():
    """To the bit: sums are of integers, as devices add in orders of their own."""
    torch.manual_seed(1)
    scores, valid = torch.randn(4, 96).mul(3).exp(), torch.ones(4, 96, dtype=torch.bool)
    shuffled = scores.view(4, 6, 16)[:, :, torch.randperm(16)].reshape(4, 96)
    for cap in (None, 48):
        found = [span_sample(each, valid, state(), 32, cap, 16) for each in (scores, shuffled)]
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_scores_that_are_not_finite_count_as_zero():
    scores = torch.tensor([[1.0, torch.nan, 3.0, 1.0, torch.inf, 2.0]])
    valid = torch.ones_like(scores, dtype=torch.bool)
    _, p = span_sample(scores, valid, state(), 2, None, 2)
    _, want = span_sample(torch.tensor([[1.0, 0.0, 3.0, 1.0, 0.0, 2.0]]), valid, state(), 2, None, 2)
    assert torch.equal(p, want) and p[0, 0] < p[0, 4] < p[0, 2]
