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
    rows: Tensor, keep: Tensor, extra: Tensor, slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows that carry gradient: those of the loss, and ``extra`` ones as far as there are slots for them.

    Args:
        rows, keep: [B, K] as of ``pack_rows``, the rows of the loss. extra: bool [B, S], further positions; some may
            be rows of the loss. slots: G, K <= G <= S.

    Returns:
        rows: int64 [B, G] and keep: bool [B, G] as of ``pack_rows``. Every row of the loss is among them; extra
            ones that find no slot are the last of their sequence.
        places: int64 [B, K], in [0, G): the slot of each row of the loss; any slot for an unused one.
        dropped: int64 [], the extra positions of the whole batch without a slot.
    """
    losses = torch.zeros_like(extra).scatter(1, rows, keep)
    more = extra & ~losses
    room = slots - keep.sum(1, keepdim=True)
    mask = losses | (more & (more.cumsum(1) <= room))
    places = (mask.cumsum(1) - 1).clamp(min=0).gather(1, rows)
    dropped = (more.sum(1, keepdim=True) - room).clamp(min=0).sum()
    return *pack_rows_reference(mask, slots), places, dropped


pack_rows = define_composite("pack_rows(Tensor mask, SymInt slots) -> (Tensor, Tensor)", pack_rows_reference)
row_weights = define_composite(
    "row_weights(Tensor rows, Tensor keep, Tensor valid, Tensor? probabilities) -> Tensor", row_weights_reference
)
gradient_rows = define_composite(
    "gradient_rows(Tensor rows, Tensor keep, Tensor extra, SymInt slots) -> (Tensor, Tensor, Tensor, Tensor)",
    gradient_rows_reference,
)
