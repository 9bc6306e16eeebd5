"""Ranks along axis 1, for the operators that select."""

from __future__ import annotations

import torch
from torch import Tensor

_LOWEST = torch.finfo(torch.float32).min


def inverse(order: Tensor) -> Tensor:
    """The inverse of the permutations ``order`` [B, N]: int64 [B, N].

    By sorting, not by scatter: Inductor (2.13, CPU) has been seen to read what a scatter writes before it is written.
    """
    return order.sort(dim=1).indices


def ranks(keys: Tensor, descending: bool = False) -> Tensor:
    """The place of each entry of ``keys`` [B, N] in the order along axis 1; of equal ones the earlier comes first."""
    return inverse(keys.sort(dim=1, descending=descending, stable=True).indices)


def comparable(scores: Tensor, valid: Tensor) -> Tensor:
    """Finite scores of candidates, below all of them what is not finite, and -inf elsewhere; float32."""
    scores = scores.float()
    return torch.where(scores.isfinite(), scores, _LOWEST).masked_fill(~valid, -torch.inf)
