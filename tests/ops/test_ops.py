"""Every operator: registration (opcheck), reference against an independent formula, edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import cggr_compile.ops  # noqa: F401  (registers)
from cggr_compile.ops import UnresolvedMarkerError
from cggr_compile.ops.metrics import STAT_NAMES

ops = torch.ops.cggr


def rows_of(batch: int, length: int, slots: int) -> torch.Tensor:
    return torch.stack([torch.randperm(length)[:slots].sort().values for _ in range(batch)])


def test_opcheck_all():
    hidden = torch.randn(2, 8, 4, requires_grad=True)
    rows, keep = rows_of(2, 8, 3), torch.tensor([[True, True, False], [True, True, True]])
    valid = torch.rand(2, 8) > 0.4
    state = torch.tensor([3, 5])
    stats = [torch.rand(2, 8) for _ in range(4)]
    calls = [
        (ops.gather_rows.default, (hidden, rows, keep)),
        (ops.scatter_rows.default, (torch.randn(2, 3, 4), rows, keep, 8)),
        (ops.fence.default, (rows,)),
        (ops.join_columns.default, ([torch.randn(3, 2), torch.randn(3, 4)],)),
        (ops.difficulty.default, (*stats, "combined")),
        (ops.uniform.default, (state, valid)),
        (ops.select_rows.default, (torch.rand(2, 8), valid, 1, 4)),
        (ops.stats.default, (keep, valid, *stats[:3])),
        (ops.stop_rows.default, (hidden.detach(), 1)),
    ]
    for op, arguments in calls:
        outcome = opcheck(op, arguments)
        assert set(outcome.values()) == {"SUCCESS"}, (op, outcome)


def test_gather_rows_gradcheck_and_adjoint():
    hidden = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    rows, keep = rows_of(2, 6, 4), torch.ones(2, 4, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda h: ops.gather_rows(h, rows, keep), (hidden,))
    values = torch.randn(2, 4, 3, dtype=torch.float64)
    forward = (ops.gather_rows(hidden, rows, keep) * values).sum()
    backward = (hidden * ops.scatter_rows(values, rows, keep, 6)).sum()
    torch.testing.assert_close(forward, backward)


def test_unused_slots_pass_no_gradient():
    hidden = torch.randn(1, 5, 3, requires_grad=True)
    rows, keep = torch.tensor([[1, 3, 0]]), torch.tensor([[True, True, False]])
    ops.gather_rows(hidden, rows, keep).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[0].abs().sum(-1).nonzero().flatten().tolist() == [1, 3]


def test_difficulty_formulas():
    p = torch.tensor([0.7, 0.2, 0.1])
    entropy = -(p * p.log()).sum()
    arguments = (entropy, p[0], p[1], p[2].log())
    expected = {"entropy": entropy - 0.7, "margin": 0.5, "loss": -math.log(0.1)}
    expected["combined"] = sum(expected.values())
    for scoring, value in expected.items():
        torch.testing.assert_close(ops.difficulty(*arguments, scoring), torch.as_tensor(value), msg=scoring)
    with pytest.raises(ValueError, match="scoring"):
        ops.difficulty(*arguments, "hardness")


def test_uniform_is_uniform_reproducible_and_moves():
    like = torch.empty(64, 512)
    draws = ops.uniform(torch.tensor([0, 0]), like)
    assert torch.equal(draws, ops.uniform(torch.tensor([0, 0]), like))
    assert draws.min() >= 0 and draws.max() < 1
    histogram = torch.histc(draws, 16, 0, 1) / draws.numel()
    assert (histogram - 1 / 16).abs().max() < 0.005
    for other in ([0, 1], [1, 0]):
        moved = ops.uniform(torch.tensor(other), like)
        assert torch.corrcoef(torch.stack([draws.flatten(), moved.flatten()]))[0, 1].abs() < 0.02
    assert torch.corrcoef(draws[:2])[0, 1].abs() < 0.15  # sequences draw independently


def test_uniform_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    ops.uniform(torch.tensor([7, 7]), torch.empty(2, 2))
    assert torch.equal(before, torch.get_rng_state())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 17), st.integers(1, 8), st.integers(1, 8), st.integers(0, 3), st.randoms())
def test_select_rows_properties(batch, length, num, den, ties, random):
    num, den = sorted((num, den))
    torch.manual_seed(random.randrange(1000))
    scores = torch.randint(0, ties + 1, (batch, length)).float() if ties else torch.rand(batch, length)
    valid = torch.rand(batch, length) > random.random()
    rows, keep = ops.select_rows(scores, valid, num, den)
    slots = math.ceil(length * num / den)
    assert rows.shape == keep.shape == (batch, slots)
    for b in range(batch):
        assert len(set(rows[b].tolist())) == slots
        chosen = rows[b][keep[b]].tolist()
        assert chosen == sorted(chosen) and keep[b].tolist() == sorted(keep[b].tolist(), reverse=True)
        candidates = valid[b].nonzero().flatten().tolist()
        best = sorted(candidates, key=lambda i: (-scores[b, i].item(), i))[:slots]
        assert chosen == sorted(best)


@pytest.mark.parametrize("name", STAT_NAMES)
def test_stats_are_finite_without_candidates(name):
    none = torch.zeros(2, 4, dtype=torch.bool)
    values = torch.rand(2, 4)
    out = ops.stats(none[:, :2], none, values, values, values)
    assert out[STAT_NAMES.index(name)].item() == 0.0


def test_stats_without_router_are_nan():
    keep, valid = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    out = ops.stats(keep, valid, None, None, None)
    assert out[:2].tolist() == [2.0, 4.0] and out[2:].isnan().all()


def test_unresolved_marker_raises():
    x = torch.randn(1, 4, 2, requires_grad=True)
    out = ops.stop_rows(x, 1)
    torch.testing.assert_close(out, x)
    with pytest.raises(UnresolvedMarkerError, match="stop_rows"):
        out.sum().backward()
