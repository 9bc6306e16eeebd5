"""``cggr::uniform`` and ``cggr::select_rows``: which positions of each sequence are trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.library import define_composite

_MASK = 0xFFFFFFFF
# Odd 31-bit multiplier of the "lowbias32" integer hash family; the product of two 32-bit numbers with it
# stays below 2**63, so that int64 arithmetic is exact on every device.
_MULTIPLIER = 0x7FEB352D


def _mix(x: Tensor) -> Tensor:
    for shift in (16, 15, 16):
        x = x ^ (x >> shift)
        x = (x * _MULTIPLIER) & _MASK
    return x ^ (x >> 16)


def uniform_reference(state: Tensor, like: Tensor) -> Tensor:
    """Pseudo-random float32 in [0, 1) of the shape of ``like`` [B, S], a pure function of ``state``.

    Args:
        state: int64 [2], (seed, step). The global generators are neither read nor advanced, and every device
            gives the same numbers.
    """
    batch = torch.arange(like.shape[0], device=like.device)[:, None]
    position = torch.arange(like.shape[1], device=like.device)[None, :]
    key = _mix((_mix(state[0] & _MASK) + state[1]) & _MASK)
    bits = _mix((_mix((key + batch) & _MASK) + position) & _MASK)
    return (bits >> 8).to(torch.float32) * (1.0 / (1 << 24))


def select_rows_reference(scores: Tensor, valid: Tensor, num: int, den: int) -> tuple[Tensor, Tensor]:
    """The ``K = ceil(S * num / den)`` candidates with the highest scores of every sequence.

    Args:
        scores: float [B, S]. valid: bool [B, S], the candidates.

    Returns:
        rows: int64 [B, K], distinct positions. The selected ones come first, sorted; a sequence with fewer
            than K candidates fills its other slots with non-candidates.
        keep: bool [B, K], True for the selected ones.
        Among equal scores the earlier position wins, on every device.
    """
    length = scores.shape[1]
    slots = (length * num + den - 1) // den
    ranked = scores.masked_fill(~valid, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    chosen = ranked[:, :slots]
    keep = valid.gather(1, chosen)
    order = torch.where(keep, chosen, chosen + length).sort(dim=1).values
    keep = order < length
    return torch.where(keep, order, order - length), keep


uniform = define_composite("uniform(Tensor state, Tensor like) -> Tensor", uniform_reference)
select_rows = define_composite(
    "select_rows(Tensor scores, Tensor valid, int num, int den) -> (Tensor, Tensor)", select_rows_reference
)
