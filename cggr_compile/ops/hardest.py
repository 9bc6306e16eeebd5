"""``cggr::hardest`` and ``cggr::hardest_of_batch``: the candidates with the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.library import define_composite
from cggr_compile.ops.ranking import comparable, ranks


def hardest_reference(scores: Tensor, valid: Tensor, slots: int | Tensor) -> Tensor:
    """The ``slots`` candidates with the highest scores of every sequence (all, where there are fewer).

    Args:
        scores: float [B, S]; a score that is not finite counts as the lowest. valid: bool [B, S], the candidates.
        slots: a number, or (not the operator) one for every sequence, int64 [B, 1].

    Returns:
        bool [B, S]. Among equal scores the earlier position wins, on every device.
    """
    return valid & _first(comparable(scores, valid), slots)


def hardest_of_batch_reference(scores: Tensor, valid: Tensor, slots: int, cap: int, least: int) -> Tensor:
    """The ``B * slots`` candidates with the highest scores of the batch.

    At most ``cap`` are of one sequence; the ``least`` with the highest scores of every sequence come before all
    others.

    Args:
        scores: float [B, S]; a score that is not finite counts as the lowest. valid: bool [B, S], the candidates.
        slots, cap: least <= slots <= cap. least: >= 0.

    Returns:
        bool [B, S]. Among equal scores the earlier sequence, then the earlier position, wins, on every device.
    """
    ranked = comparable(scores, valid)
    allowed = valid & _first(ranked, cap)
    ranked = ranked.masked_fill(~allowed, -torch.inf).masked_fill(allowed & _first(ranked, least), torch.inf)
    chosen = _first(ranked.reshape(1, -1), valid.shape[0] * slots)
    return allowed & chosen.view_as(allowed)


def _first(scores: Tensor, number: int | Tensor) -> Tensor:
    """bool: the ``number`` highest along axis 1."""
    return ranks(scores, descending=True) < number


hardest = define_composite("hardest(Tensor scores, Tensor valid, SymInt slots) -> Tensor", hardest_reference)
hardest_of_batch = define_composite(
    "hardest_of_batch(Tensor scores, Tensor valid, SymInt slots, SymInt cap, SymInt least) -> Tensor",
    hardest_of_batch_reference,
)
