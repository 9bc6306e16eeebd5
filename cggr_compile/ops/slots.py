"""A selection as a static number of slots per sequence.

``cggr::pack_rows`` and ``cggr::row_weights`` for the rows that carry loss, ``cggr::gradient_rows`` for those that carry
gradient, where these are more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.library import define_composite


def pack_rows_reference(mask: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The selected positions of every sequence, in ``slots`` slots.

    Args:
        mask: bool [B, S], at most ``slots`` per sequence. slots: K <= S.

    Returns:
        rows: int64 [B, K], distinct positions: the selected ones first, in ascending order; slots that are left
            over hold positions that are not selected.
        keep: bool [B, K], True for the selected ones.
    """
    length = mask.shape[1]
    position = torch.arange(length, device=mask.device)
    order = torch.where(mask, position, position + length).sort(dim=1).values[:, :slots]
    keep = order < length
    return torch.where(keep, order, order - length), keep


def row_weights_reference(rows: Tensor, keep: Tensor, valid: Tensor, probabilities: Tensor | None) -> Tensor:
    """What the loss of each selected position counts: sum(weight * loss) stands for the sum over all candidates.

    Args:
        rows, keep: [B, K] as of ``pack_rows``. valid: bool [B, S], the candidates.
        probabilities: float32 [B, S] of being selected: the weight is 1/p, and the sum unbiased (Horvitz and Thompson
            1952). None, for selections that are not random: candidates / selected for all, so that
            sum(weight * loss) / candidates is the mean over the selected ones.

    Returns:
        float32 [B, K], 0 for unused slots.
    """
    if probabilities is None:
        return keep * (valid.sum() / keep.sum().clamp(min=1))
    return torch.where(keep, 1.0 / probabilities.gather(1, rows), 0.0)


def gradient_rows_reference(
    rows: Tensor, keep: Tensor, extra: Tensor | None, distance: Tensor | None, slots: int, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows that carry gradient: those of the loss, then ``extra`` ones, then context, as far as there are slots.

    Args:
        rows, keep: [B, K] as of ``pack_rows``, the rows of the loss.
        extra: bool [B, S], further positions; some may be rows of the loss. None: no such ones.
        distance: int64 [B, S] as of ``context_distance``: context where it is more than 0 and less than S. None: no
            context.
        slots: G, K <= G <= S. length: S.

    Returns:
        rows: int64 [B, G] and keep: bool [B, G] as of ``pack_rows``. Every row of the loss is among them. Of the extra
            ones the last of their sequence find no slot, of the context what is farthest from a row of the loss (of
            two as far, the last).
        places: int64 [B, K], in [0, G): the slot of each row of the loss; any slot for an unused one.
        counts: int64 [3], of the whole batch: rows with a slot, extra ones without, context without.
    """
    losses = torch.zeros(rows.shape[0], length, dtype=torch.bool, device=rows.device).scatter(1, rows, keep)
    # 0: loss, 1: extra, 1 + distance: context, last: no gradient
    last = length + 1
    order = torch.full_like(losses, last, dtype=torch.int64)
    if distance is not None:
        order = torch.where((distance > 0) & (distance < length), 1 + distance, order)
    if extra is not None:
        order = torch.where(extra, 1, order)
    order = torch.where(losses, 0, order)
    first = (order * length + torch.arange(length, device=rows.device)).sort(1).values[:, :slots]
    mask = torch.zeros_like(losses).scatter(1, first % length, first < last * length)
    missed = ~mask & (order < last)
    counts = torch.stack([mask.sum(), (missed & (order == 1)).sum(), (missed & (order > 1)).sum()])
    places = (mask.cumsum(1) - 1).clamp(min=0).gather(1, rows)
    return *pack_rows_reference(mask, slots), places, counts


pack_rows = define_composite("pack_rows(Tensor mask, SymInt slots) -> (Tensor, Tensor)", pack_rows_reference)
row_weights = define_composite(
    "row_weights(Tensor rows, Tensor keep, Tensor valid, Tensor? probabilities) -> Tensor", row_weights_reference
)
gradient_rows = define_composite(
    "gradient_rows(Tensor rows, Tensor keep, Tensor? extra, Tensor? distance, SymInt slots, SymInt length) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    gradient_rows_reference,
)
