"""``cggr::stats``: the step's metrics as one small tensor, read only when somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.library import define_composite

STAT_NAMES = ("tokens_selected", "tokens_total", "avg_confidence", "avg_entropy", "avg_difficulty")

# where three more figures begin, of graphs with gradient rows that carry no loss: see ``cggr::gradient_rows``
GRADIENT = len(STAT_NAMES)
GRADIENT_NAMES = ("gradient_tokens", "extra_overflow", "context_overflow")


def stats_reference(
    keep: Tensor,
    valid: Tensor,
    top1: Tensor | None,
    entropy: Tensor | None,
    difficulty: Tensor | None,
    counts: Tensor | None = None,
) -> Tensor:
    """float32 [5] in the order of STAT_NAMES; [8] with ``counts``, which are the last.

    Args:
        keep: bool [B, K], used slots. valid: bool [B, S], candidates.
        top1, entropy, difficulty: float32 [B, S] of the router, averaged over the candidates; None gives NaN.
        counts: int64 [3] in the order of GRADIENT_NAMES, see ``cggr::gradient_rows``.
    """
    total = valid.sum()
    averages = [
        value.masked_fill(~valid, 0.0).sum() / total.clamp(min=1)
        if value is not None
        else torch.full((), torch.nan, device=keep.device)
        for value in (top1, entropy, difficulty)
    ]
    figures = torch.stack([keep.sum().float(), total.float(), *averages])
    return figures if counts is None else torch.cat([figures, counts.float()])


stats = define_composite(
    "stats(Tensor keep, Tensor valid, Tensor? top1, Tensor? entropy, Tensor? difficulty, Tensor? counts=None) "
    "-> Tensor",
    stats_reference,
)
