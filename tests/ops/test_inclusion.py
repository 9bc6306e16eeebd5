"""Inclusion probabilities, against the definition in float64. Its cases serve test_sample too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import cggr_compile.ops  # noqa: F401  (registers)

probabilities = torch.ops.cggr.inclusion_probabilities


def make_case(batch, length, shape, seed):
    """Scores of several distributions, and candidates."""
    torch.manual_seed(seed)
    noise = torch.randn(batch, length)
    scores = {
        "entropy": noise - 1.0,  # partly negative
        "heavy": noise.mul(3).exp(),
        "huge": noise.abs() * 1e30,
        "tiny": noise.abs() * 1e-30,
        "ties": noise.round(),
        "zero": torch.zeros_like(noise),
        "one": torch.zeros_like(noise).index_fill(1, torch.tensor([0]), 5.0),
    }[shape]
    return scores, torch.rand(batch, length) < torch.rand(batch, 1) * 1.2


SHAPES = st.sampled_from(["entropy", "heavy", "huge", "tiny", "ties", "zero", "one"])


def expected(scores, valid, slots):
    """min(1, r a) per sequence, r found by bisection."""
    out = torch.zeros_like(scores, dtype=torch.float64)
    for row in range(len(scores)):
        at = valid[row].nonzero().flatten()
        score = scores[row, at].double()
        if len(at) == 0:
            continue
        score = score - score.min().clamp(max=0)
        share = 0.5 + 0.5 * score / score.mean() if score.sum() > 0 else torch.ones_like(score)
        low, high = 0.0, 1e9
        for _ in range(200):
            middle = (low + high) / 2
            enough = (middle * share).clamp(max=1).sum() >= min(slots, len(at))
            low, high = (low, middle) if enough else (middle, high)
        out[row, at] = (high * share).clamp(max=1)
    return out


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), SHAPES, st.floats(0.02, 1.0), st.integers(0, 999))
def test_sum_to_the_slots_and_follow_the_scores(batch, length, shape, ratio, seed):
    scores, valid = make_case(batch, length, shape, seed)
    slots = max(1, round(ratio * length))
    got = probabilities(scores, valid, slots, None).double()
    assert torch.equal(got.sum(1), valid.sum(1).clamp(max=slots).double()), "exactly"
    torch.testing.assert_close(got, expected(scores, valid, slots), atol=5e-5, rtol=5e-5)
    assert (got[valid] > 0).all() and (got[~valid] == 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), SHAPES, st.floats(0.05, 1.0), st.floats(1.0, 3.0), st.integers(0, 999))
@example(3, 8, "zero", 0.25, 2.0, 798)  # the mean demand is no whole number
def test_over_the_batch(batch, length, shape, ratio, more, seed):
    scores, valid = make_case(batch, length, shape, seed)
    slots = max(1, round(ratio * length))
    cap = min(length, round(slots * more))
    got = probabilities(scores, valid, slots, cap).double()
    limits = valid.sum(1).clamp(max=cap).double()
    assert (got.sum(1) <= limits).all() and got.sum() <= batch * slots
    assert (got[valid] > 0).all() and (got[~valid] == 0).all() and got.max() <= 1
    if not (got.sum(1) == limits).any():
        assert got.sum() > batch * slots * (1 - 1e-3), "slots are left over though no sequence is full"


def test_over_the_batch_difficult_sequences_get_more():
    scores = torch.tensor([[1.0] * 8, [3.0] * 8])
    got = probabilities(scores, torch.ones(2, 8, dtype=torch.bool), 2, 8)
    # shares 1/2 + 1/2 score / 2
    torch.testing.assert_close(got, torch.tensor([[0.75 / 4] * 8, [1.25 / 4] * 8]))
    per_sequence = probabilities(scores, torch.ones(2, 8, dtype=torch.bool), 2, None)
    assert (per_sequence == 0.25).all()


def test_without_scores():
    valid = torch.tensor([[True] * 3 + [False], [True] * 4, [False] * 4])
    got = probabilities(None, valid, 2, None)
    torch.testing.assert_close(got, torch.tensor([[2 / 3] * 3 + [0.0], [0.5] * 4, [0.0] * 4]))
    assert got[0].double().sum() == 2.0
    torch.testing.assert_close(got, probabilities(torch.full((3, 4), -7.0), valid, 2, None))


def test_a_score_that_is_not_finite_counts_as_zero():
    valid = torch.ones(1, 4, dtype=torch.bool)
    got = probabilities(torch.tensor([[torch.nan, 2.0, torch.inf, -torch.inf]]), valid, 1, None)
    assert torch.equal(got, probabilities(torch.tensor([[0.0, 2.0, 0.0, 0.0]]), valid, 1, None))


@pytest.mark.parametrize("length", [4096, 131072])
def test_long_sequences_do_not_overflow(length):
    torch.manual_seed(0)
    valid = torch.ones(2, length, dtype=torch.bool)
    for scores in (torch.rand(2, length), torch.randn(2, length).mul(4).exp()):
        for slots in (1, length // 4, length - 1):
            for cap in (None, length):
                got = probabilities(scores, valid, slots, cap).double()
                assert (got > 0).all() and (got <= 1).all()
                if cap is None:
                    assert torch.equal(got.sum(1), torch.full((2,), float(slots), dtype=torch.float64))


def test_the_order_of_summation_does_not_matter():
    """Integers: permuted scores have the permuted probabilities, up to the unit each that makes the sum exact."""
    scores = torch.randn(1, 200).exp()
    order = torch.randperm(200)
    got = probabilities(scores, torch.ones(1, 200, dtype=torch.bool), 50, None)
    permuted = probabilities(scores[:, order], torch.ones(1, 200, dtype=torch.bool), 50, None)
    assert (got[:, order] - permuted).abs().max() <= 2.0**-24


@pytest.mark.parametrize("batch_cap", [None, 9])
def test_positions_are_not_multiplied_beyond_32_bits(batch_cap):
    """Inductor multiplies them in 32 bits on CUDA; tests/gpu/test_selection.py sees what comes of it."""
    scores, valid = make_case(2, 4096, "entropy", 0)
    graph = make_fx(lambda s, v: probabilities(s, v, 6, batch_cap))(scores, valid).graph
    positions = graph.find_nodes(op="call_function", target=torch.ops.aten.arange.default)
    assert positions
    for node in positions:
        for user in node.users:
            factors = [value for value in user.args if isinstance(value, int)]
            assert user.target != torch.ops.aten.mul.Tensor or 4096 * max(factors) < 2**31
