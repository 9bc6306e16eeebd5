"""``cggr::span_sample``: random blocks of consecutive positions, and what they weigh."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cggr_compile.ops.inclusion import inclusion_probabilities_reference, on_grid
from cggr_compile.ops.library import define_composite
from cggr_compile.ops.sample import systematic_sample_reference

_MEAN_BITS = 4  # of a mean below one step of the grid: with them it still is exact in float32


def span_sample_reference(
    scores: Tensor | None, valid: Tensor, state: Tensor, slots: int, batch_cap: int | None, span: int
) -> tuple[Tensor, Tensor]:
    """Selects whole blocks: ``cggr::inclusion_probabilities`` and ``cggr::systematic_sample`` of their mean scores.

    A sequence is cut into aligned blocks of the same size, at most ``span``; the last one may be shorter. As few
    blocks as can fill the slots do so, of the largest size that fits: with 512 slots and span 64 they are 8 of 64
    positions, with 100 slots 2 of 50, with 20 slots 1 of 20. A block has the mean score of its candidates, and is none
    itself where it has none.

    Args:
        scores: float [B, S]; a score that is not finite counts as 0. None for equal ones.
        valid: bool [B, S], the candidates. state: int64 [2], (seed, step).
        slots: of a sequence, >= 1. batch_cap: as of ``inclusion_probabilities``, at least ``slots``.
        span: the most positions of a block, >= 1.

    Returns:
        the selection, bool [B, S]: every candidate of the chosen blocks, at most ``slots`` (``batch_cap``) of a
        sequence.
        each candidate's probability to be in it, float32 [B, S], that of its block.
    """
    length = valid.shape[1]
    number = (slots + span - 1) // span
    size = slots // number
    count = _sums(valid.long(), size)
    means = None
    if scores is not None:
        scores = torch.where(valid & scores.isfinite(), scores.float(), 0.0)
        # integers: their sums are the same in any order. What sequences share is one scale, where they compete
        grid = on_grid(scores, (1,) if batch_cap is None else (0, 1))
        means = ((_sums(grid, size) << _MEAN_BITS) // count.clamp(min=1)).float()
    cap = None if batch_cap is None else batch_cap // size
    probabilities = inclusion_probabilities_reference(means, count > 0, number, cap)
    chosen = systematic_sample_reference(probabilities, state)
    block = torch.arange(length, device=valid.device) // size
    return valid & chosen[:, block], torch.where(valid, probabilities[:, block], 0.0)


def _sums(values: Tensor, size: int) -> Tensor:
    """Of every block of ``size`` positions: [B, N] of [B, S], N = ceil(S / size)."""
    batch, length = values.shape
    blocks = (length + size - 1) // size
    return F.pad(values, (0, blocks * size - length)).view(batch, blocks, size).sum(2)


span_sample = define_composite(
    "span_sample(Tensor? scores, Tensor valid, Tensor state, SymInt slots, SymInt? batch_cap, int span)"
    " -> (Tensor, Tensor)",
    span_sample_reference,
)
