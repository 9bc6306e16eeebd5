"""``cggr::inclusion_probabilities``: how likely each candidate is to be selected.

All sums are of integers, so that their order does not matter and every device gives the same probabilities for the
same scores: shares in units of 2**-16, probabilities in units of 2**-24 (as float32 they are exact).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.library import define_composite

_BITS = 24
ONE = 1 << _BITS  # probability 1
_HALF = 1 << 15  # share 1/2
_SCORE_BITS = 20


def inclusion_probabilities_reference(
    scores: Tensor | None, valid: Tensor, slots: int, batch_cap: int | None
) -> Tensor:
    """p_i = min(1, r a_i) with a_i = 1/2 + 1/2 score_i / mean score, over the candidates.

    The half that does not depend on the score bounds the weights 1/p (importance sampling as in Katharopoulos and
    Fleuret, arXiv 1803.00942, mixed with uniform sampling). r is such that the p of a sequence add up to exactly the
    number of slots it gets. Scores may be negative: where a candidate's is, all of them are raised by the lowest
    one, so that it becomes 0. A score that is not finite counts as 0.

    Args:
        scores: float [B, S]; None for equal ones, p = slots / candidates.
        valid: bool [B, S], the candidates.
        slots: of a sequence, which uses no more than it has candidates.
        batch_cap: None takes every sequence by itself. A number compares the scores over the whole batch: its
            ``B * slots`` slots go to the sequences in proportion to their sum of a_i, but at most ``batch_cap`` to one;
            what does not fit under that is not used.

    Returns:
        float32 [B, S], multiples of 2**-24; 0 for positions that are no candidates.
    """
    count = valid.sum(1, keepdim=True)
    share = torch.where(valid, 2 * _HALF, 0) if scores is None else _shares(scores, valid, batch_cap is not None)
    if batch_cap is None:
        quota = count.clamp(max=slots) * ONE
    else:
        demand = share.sum(1, keepdim=True)
        mean = -(-demand.sum() // valid.shape[0])  # rounded up: the quotas must not exceed the budget
        quota = torch.minimum(((demand << 16) // mean.clamp(min=1) * slots) << 8, count.clamp(max=batch_cap) * ONE)
    certain = torch.zeros_like(valid) if scores is None else _certain(share, quota)
    left = quota - certain.sum(1, keepdim=True) * ONE
    open_share = share.masked_fill(certain, 0)
    probability = open_share * left // open_share.sum(1, keepdim=True).clamp(min=1)
    # the units that rounding down has lost: one each for the first candidates
    lost = left - probability.sum(1, keepdim=True)
    is_open = open_share > 0
    probability = probability + (is_open & (is_open.cumsum(1) <= lost)).long()
    return probability.masked_fill(certain, ONE).float() * (1.0 / ONE)


def on_grid(scores: Tensor, over: tuple[int, ...]) -> Tensor:
    """Finite float32 scores as int64, below 2**20, by a power of two that brings the largest into the upper half."""
    exponent = scores.abs().amax(over, keepdim=True).view(torch.int32) >> 23
    scale = ((2 * 127 + _SCORE_BITS - 1 - exponent.clamp(min=_SCORE_BITS)) << 23).view(torch.float32)
    return (scores * scale).long()


def _shares(scores: Tensor, valid: Tensor, whole_batch: bool) -> Tensor:
    """a_i in units of 2**-16, int64 [B, S]; 0 for positions that are no candidates."""
    over = (0, 1) if whole_batch else (1,)
    scores = scores.float()
    scores = torch.where(valid & scores.isfinite(), scores, 0.0)
    scores = torch.where(valid, scores - scores.amin(over, keepdim=True).clamp(max=0.0), 0.0)
    grid = on_grid(scores, over)
    total = grid.sum(over, keepdim=True).clamp(min=1)
    return torch.where(valid, _HALF + grid * valid.sum(over, keepdim=True) * _HALF // total, 0)


def _certain(share: Tensor, quota: Tensor) -> Tensor:
    """Which candidates get p = 1: the j-th largest does if, with those before it certain, r a_j is 1 or more."""
    count = (share > 0).sum(1, keepdim=True)
    # a share that is certain by far is as good as one that is so by a factor of 2; products stay below 2**63
    share = torch.minimum(share, (count << 41) // quota.clamp(min=1))
    ordered = share.sort(1, descending=True).values
    rest = ordered.sum(1, keepdim=True) - ordered.cumsum(1) + ordered
    # shifted, not multiplied: Inductor multiplies positions in 32 bits on CUDA (pytorch issue 183901)
    before = torch.arange(share.shape[1], device=share.device) << _BITS
    number = ((ordered * (quota - before) >= rest * ONE) & (ordered > 0)).sum(1, keepdim=True)
    threshold = ordered.gather(1, (number - 1).clamp(min=0))
    return (share >= threshold) & (share > 0) & (number > 0)


inclusion_probabilities = define_composite(
    "inclusion_probabilities(Tensor? scores, Tensor valid, SymInt slots, SymInt? batch_cap) -> Tensor",
    inclusion_probabilities_reference,
)
