"""``cggr::pack_rows`` and ``cggr::row_weights``: a selection as a static number of slots per sequence."""

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


pack_rows = define_composite("pack_rows(Tensor mask, SymInt slots) -> (Tensor, Tensor)", pack_rows_reference)
row_weights = define_composite(
    "row_weights(Tensor rows, Tensor keep, Tensor valid, Tensor? probabilities) -> Tensor", row_weights_reference
)
