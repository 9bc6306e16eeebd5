"""``cggr::stats``: the step's metrics as one small tensor, read only when somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from cggr_compile.ops.library import define_composite

STAT_NAMES = ("tokens_selected", "tokens_total", "avg_confidence", "avg_entropy", "avg_difficulty")
_TOTAL = STAT_NAMES.index("tokens_total")

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


def join_stats_reference(stats: list[Tensor]) -> Tensor:
    """The figures of several forwards as those of one: float32 [5], or [8] if some have gradient rows without loss.

    Numbers of tokens are summed, averages weighted by the candidates.
    """
    if any(each.shape[0] > GRADIENT for each in stats):  # in the others every row that carries gradient carries loss
        stats = [each if each.shape[0] > GRADIENT else pad(torch.cat([each, each[:1]]), (0, 2)) for each in stats]
    table = torch.stack(stats)
    sums, candidates = table.sum(0), table[:, _TOTAL : _TOTAL + 1]
    averages = (table * candidates).sum(0) / sums[_TOTAL].clamp(min=1)
    return torch.cat([sums[: _TOTAL + 1], averages[_TOTAL + 1 : GRADIENT], sums[GRADIENT:]])


stats = define_composite(
    "stats(Tensor keep, Tensor valid, Tensor? top1, Tensor? entropy, Tensor? difficulty, Tensor? counts=None) "
    "-> Tensor",
    stats_reference,
)
join_stats = define_composite("join_stats(Tensor[] stats) -> Tensor", join_stats_reference)
