"""Which tokens are selected, as a mask: the number of them is a tensor, the shapes never change."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.inclusion import ONE
from cggr_compile.ops.ranking import comparable, ranks
from cggr_compile.ops.uniform import uniform

_ROUNDING = 1e-3  # of ratio * count in float32: ceil(0.1 * 30) is 3


def token_mask(
    selection: str,
    difficulty: Tensor,
    valid: Tensor,
    ratio: Tensor,
    step: Tensor,
    *,
    num_strata: int,
    min_tokens_per_sequence: int,
) -> Tensor:
    """bool [B, S]: the selected ones of the ``valid`` tokens, exactly as many as asked for, also among ties.

    Where there is a candidate, one at least is selected: of the batch, for ``topk`` and ``fixed_quota`` of every
    sequence. ``ratio`` 1.0 selects them all.

    Args:
        selection: see :class:`cggr_compile.modules.settings.Settings`.
        difficulty: float32 [B, S]. valid: bool [B, S], the candidates.
        ratio: float32 [], share of the candidates in (0, 1]; rounded up to whole tokens.
        step: int64 [], seeds what is random.
    """
    if selection == "stratified":
        return _stratified(difficulty, valid, ratio, step, num_strata)
    if selection in ("topk", "fixed_quota"):
        return valid & (_rank(difficulty, valid) < _quota(ratio, valid.sum(1, keepdim=True)))
    hardest = _rank(difficulty.reshape(1, -1), valid.reshape(1, -1)) < _quota(ratio, valid.sum())
    return valid & (hardest.view(valid.shape) | (_rank(difficulty, valid) < min_tokens_per_sequence))


def _quota(ratio: Tensor, count: Tensor) -> Tensor:
    """ceil(ratio * count), at least 1, at most count."""
    wanted = torch.ceil(ratio * count - _ROUNDING).long().clamp(min=1)
    return torch.minimum(wanted, count)


def _rank(scores: Tensor, valid: Tensor) -> Tensor:
    """int64 [R, N]: the place of every element in its row, the highest valid score first; ties by position.

    Among the valid ones a score that is not finite comes last.
    """
    return ranks(comparable(scores, valid), descending=True)


def _stratified(difficulty: Tensor, valid: Tensor, ratio: Tensor, step: Tensor, num_strata: int) -> Tensor:
    """The same share, at random, of each of ``num_strata`` equal parts of the candidates in order of difficulty."""
    flat_valid = valid.reshape(1, -1)
    count = flat_valid.sum()
    rank = _rank(difficulty.reshape(1, -1), flat_valid)
    stratum = torch.where(flat_valid, rank * num_strata // count.clamp(min=1), num_strata)
    # stratum j begins at rank ceil(j * count / num_strata); a last, empty one takes what is no candidate
    begins = -(-torch.arange(num_strata + 1, device=rank.device) * count // num_strata)
    quota = _quota(ratio, begins.diff())
    state = torch.stack((torch.zeros_like(step), step))
    noise = (uniform(state, valid).reshape(1, -1) * ONE).long()
    shuffled = ranks(stratum * ONE + noise)
    inside = stratum.clamp(max=num_strata - 1)
    mask = shuffled - begins[inside] < quota[inside]
    return valid & mask.view(valid.shape)
