"""Random selections: who is in them, how often, and reproducibly."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_inclusion import SHAPES, make_case

import cggr_compile.ops  # noqa: F401  (registers)
from cggr_compile.ops.inclusion import ONE
from cggr_compile.ops.sample import _hits

ops = torch.ops.cggr


def state(step=0, seed=0):
    return torch.tensor([seed, step])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), SHAPES, st.floats(0.02, 1.0), st.integers(0, 999))
def test_systematic_takes_as_many_as_there_are_slots(batch, length, shape, ratio, seed):
    scores, valid = make_case(batch, length, shape, seed)
    slots = max(1, round(ratio * length))
    p = ops.inclusion_probabilities(scores, valid, slots, None)
    mask = ops.systematic_sample(p, state(seed))
    assert torch.equal(mask.sum(1), valid.sum(1).clamp(max=slots))
    assert not (mask & ~valid).any() and mask[p == 1].all()
    if slots == length:
        assert torch.equal(mask, valid)
    p = ops.inclusion_probabilities(scores, valid, slots, slots)
    assert (ops.systematic_sample(p, state(seed)).sum(1) <= slots).all(), "over the batch, the cap holds"


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_systematic_is_unbiased_by_enumeration(slots):
    """Every permutation, and every start (the pattern changes only where an interval begins): P(i) is p_i, exactly."""
    scores, valid = torch.tensor([[0.1, 5.0, 9.0, 0.3, 0.0]]), torch.tensor([[True, True, False, True, True]])
    p = ops.inclusion_probabilities(scores, valid, slots, None)[0]
    sizes = (p * ONE).long()
    losses = torch.tensor([3.0, -1.0, 100.0, 0.5, 2.0], dtype=torch.float64)
    included, estimate = torch.zeros(5, dtype=torch.float64), 0.0
    permutations = [list(order) for order in itertools.permutations(range(5))]
    for order in permutations:
        ends = [0, *sizes[order].cumsum(0).tolist()]
        cuts = sorted({0, ONE, *(-end % ONE for end in ends)})
        for start, stop in itertools.pairwise(cuts):
            hit = torch.zeros(5, dtype=torch.bool)
            hit[order] = _hits(sizes[None, order], torch.tensor([[start]]))[0]
            chance = (stop - start) / ONE / len(permutations)
            included += hit.double() * chance
            estimate += float((losses[hit] / p[hit].double()).sum()) * chance
    torch.testing.assert_close(included, p.double(), atol=1e-12, rtol=0)
    assert estimate == pytest.approx(float(losses[valid[0]].sum()), abs=1e-9)


def test_systematic_frequencies():
    """The hash-random permutations and starts that training uses have the right frequencies, also in pairs."""
    scores, valid = torch.tensor([[0.1, 5.0, 9.0, 0.3, 0.0, 1.0]]), torch.ones(1, 6, dtype=torch.bool)
    p = ops.inclusion_probabilities(scores, valid, 2, None)
    rounds = 4000
    masks = torch.cat([ops.systematic_sample(p.expand(8, -1), state(step)) for step in range(rounds // 8)])
    together = masks.double().T @ masks.double() / rounds
    assert (together.diagonal() - p[0]).abs().max() < 4 * 0.5 / rounds**0.5
    assert (together > 0.01).all(), "two positions that are never selected together"


def test_reproducible():
    p = ops.inclusion_probabilities(torch.rand(4, 64), torch.ones(4, 64, dtype=torch.bool), 16, None)
    first = ops.systematic_sample(p, state(3))
    assert torch.equal(first, ops.systematic_sample(p, state(3)))
    assert not torch.equal(first, ops.systematic_sample(p, state(4)))
    assert not torch.equal(first, ops.systematic_sample(p, state(3, seed=1)))
    assert len({tuple(row) for row in ops.systematic_sample(p[:1].expand(4, -1), state()).tolist()}) == 4


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), SHAPES, st.floats(0.02, 1.0), st.integers(1, 9), st.integers(0, 999))
def test_every_stratum_is_represented(batch, length, shape, ratio, strata, seed):
    scores, valid = make_case(batch, length, shape, seed)
    slots = max(1, round(ratio * length))
    mask, p = ops.stratified_sample(scores, valid, state(seed), slots, strata)
    assert not (mask & ~valid).any() and (p[~valid] == 0).all() and (p[valid] > 0).all() and p.max() <= 1
    for row in range(batch):
        at = valid[row].nonzero().flatten().tolist()
        ranked = sorted(at, key=lambda i: (-scores[row, i].item(), i))
        quota = min(slots, len(at))
        parts = min(strata, quota)
        assert int(mask[row].sum()) == quota
        begin = 0
        for part in range(parts):
            size = len(at) // parts + (part < len(at) % parts)
            members = ranked[begin : begin + size]
            taken = int(mask[row, members].sum())
            assert taken >= 1 and taken in (quota // parts, quota // parts + 1)
            torch.testing.assert_close(p[row, members], torch.full((size,), taken / size))
            begin += size
        if slots == length:
            assert torch.equal(mask[row], valid[row])


def test_stratified_is_random_inside():
    scores, valid = torch.arange(9.0)[None].expand(64, -1), torch.ones(64, 9, dtype=torch.bool)
    frequency = torch.zeros(9)
    for step in range(40):
        mask, p = ops.stratified_sample(scores, valid, state(step), 4, 3)
        frequency += mask.float().mean(0) / 40
    assert (frequency - p[0]).abs().max() < 4 * 0.5 / (40 * 64) ** 0.5
    torch.testing.assert_close(p[0], torch.tensor([1, 1, 1, 1, 1, 1, 2, 2, 2]) / 3)  # the hardest get what is over


def select_in_every_way(scores, valid, state):
    """Selections, probabilities and weights of all strategies, for comparing devices and compilers bit by bit."""
    found = []
    for cap in (None, 9):
        p = ops.inclusion_probabilities(scores, valid, 6, cap)
        rows, keep = ops.pack_rows(ops.systematic_sample(p, state), 9)
        found += [p, rows, keep, ops.row_weights(rows, keep, valid, p)]
        found += ops.span_sample(scores, valid, state, 6, cap, 3)
    found += ops.stratified_sample(scores, valid, state, 7, 3)
    return [*found, ops.hardest(scores, valid, 5), ops.hardest_of_batch(scores, valid, 5, 8, 2)]


@pytest.mark.slow
def test_inductor_selects_the_same():
    cases = [(*make_case(3, 50, shape, 1), state(5)) for shape in ("entropy", "heavy", "ties")]
    wanted = [select_in_every_way(*case) for case in cases]
    compiled = torch.compile(select_in_every_way)
    # torch's caches do not see what a composite operator consists of
    with torch._inductor.config.patch(force_disable_caches=True):
        for case, want in zip(cases, wanted, strict=True):
            assert all(torch.equal(*pair) for pair in zip(compiled(*case), want, strict=True))
