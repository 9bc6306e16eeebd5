"""Every operator: registration (opcheck), reference against an independent formula, edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

import cggr_compile.ops  # noqa: F401  (registers)
from cggr_compile.ops import UnresolvedMarkerError
from cggr_compile.ops.metrics import GRADIENT, STAT_NAMES

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
        (ops.fusion_barrier.default, (rows,)),
        (ops.fusion_barrier.default, (hidden.detach(), 2)),
        (ops.concat_in_place.default, ([torch.randn(3, 2), torch.randn(3, 4)], 1)),
        (ops.materialize.default, (hidden.detach(),)),
        (ops.difficulty.default, (*stats, "combined")),
        (ops.difficulty.default, (*stats, "el2n"), dict(logsumexp=stats[0] + 5, doubled=stats[1] + 9)),
        (ops.carry.default, (torch.arange(4), stats[0])),
        (ops.check_labels.default, (torch.arange(4), 4, -100)),
        (ops.uniform.default, (state, valid)),
        (ops.inclusion_probabilities.default, (torch.randn(2, 8), valid, 3, None)),
        (ops.inclusion_probabilities.default, (None, valid, 3, 5)),
        (ops.systematic_sample.default, (torch.full((2, 8), 0.25), state)),
        (ops.stratified_sample.default, (torch.rand(2, 8), valid, state, 3, 2)),
        (ops.span_sample.default, (torch.rand(2, 8), valid, state, 4, None, 3)),
        (ops.span_sample.default, (None, valid, state, 3, 5, 3)),
        (ops.hardest.default, (torch.rand(2, 8), valid, 3)),
        (ops.hardest_of_batch.default, (torch.rand(2, 8), valid, 3, 4, 1)),
        (ops.pack_rows.default, (valid, 8)),
        (ops.row_weights.default, (rows, keep, valid, torch.rand(2, 8))),
        (ops.row_weights.default, (rows, keep, valid, None)),
        (ops.context_distance.default, (valid, None, None, 3)),
        (ops.context_distance.default, (valid, valid[:1], valid, 20)),
        (ops.gradient_rows.default, (rows, keep, valid, None, 6, 8)),
        (ops.gradient_rows.default, (rows, keep, None, torch.randint(0, 9, (2, 8)), 6, 8)),
        (ops.stats.default, (keep, valid, *stats[:3])),
        (ops.stats.default, (keep, valid, *stats[:3], torch.tensor([5, 0, 2]))),
        (ops.join_stats.default, ([torch.rand(5), torch.rand(8)],)),
        (ops.detach_unselected.default, (hidden.detach(), 1)),
        (ops.scale_selected_grads.default, (rows, torch.rand(2, rows.shape[1]))),
    ]
    for op, arguments, *named in calls:
        outcome = opcheck(op, arguments, *named)
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


def test_stats_end_with_the_counts_of_gradient_rows():
    keep, valid = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    out = ops.stats(keep, valid, None, None, None, torch.tensor([9, 0, 3]))
    assert out.shape == (len(STAT_NAMES) + 3,) and out[GRADIENT:].tolist() == [9.0, 0.0, 3.0]


def test_figures_of_several_forwards():
    """Numbers are summed, averages weighted by the candidates. Where no others carry gradient, those with loss do."""
    one, other = torch.tensor([2.0, 10, 0.5, 3, 1]), torch.tensor([4.0, 30, 0.1, 1, 2])
    assert torch.equal(ops.join_stats([one]), one)
    torch.testing.assert_close(ops.join_stats([one, other]), torch.tensor([6.0, 40, 0.2, 1.5, 1.75]))
    wide = ops.join_stats([torch.cat([one, torch.tensor([5.0, 1, 7])]), other])
    torch.testing.assert_close(wide, torch.tensor([6.0, 40, 0.2, 1.5, 1.75, 9, 1, 7]))
    assert torch.equal(ops.join_stats([torch.zeros(5), torch.zeros(5)]), torch.zeros(5))


def test_el2n_formula():
    def el2n(logsumexp, doubled, label_logprob):
        unread = [torch.zeros_like(label_logprob)] * 3
        return ops.difficulty(*unread, label_logprob, "el2n", logsumexp=logsumexp, doubled=doubled)

    logits, labels = torch.randn(3, 5, 11) * 3, torch.randint(0, 11, (3, 5))
    logp = logits.log_softmax(-1)
    arguments = logits.logsumexp(-1), (2 * logits).logsumexp(-1), logp.gather(-1, labels[..., None])[..., 0]
    expected = (logp.exp() - torch.nn.functional.one_hot(labels, 11)).norm(dim=-1)
    torch.testing.assert_close(el2n(*arguments), expected, atol=1e-4, rtol=1e-4)
    certain = torch.tensor([3.0]), torch.tensor([6.0]), torch.tensor([0.0])
    assert el2n(*certain).item() == 0.0  # and not the root of a rounding error below 0


def test_unresolved_marker_raises():
    x = torch.randn(1, 4, 2, requires_grad=True)
    out = ops.detach_unselected(x, 1)
    torch.testing.assert_close(out, x)
    with pytest.raises(UnresolvedMarkerError, match="detach_unselected"):
        out.sum().backward()
