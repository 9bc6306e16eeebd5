"""``cggr::context_distance``: how far the positions in front of the rows of the loss are from them."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.library import define_composite


def context_distance_reference(loss: Tensor, starts: Tensor | None, real: Tensor | None, reach: int) -> Tensor:
    """The distance from every position to the next row of the loss of its document, where that is near enough.

    Args:
        loss: bool [B, S], the rows that carry loss.
        starts: bool [B or 1, S], where a document begins; None: a sequence is one document.
        real: bool [B, S], False at padding, which is no context; None: there is none.
        reach: the largest distance, >= 1.

    Returns:
        int64 [B, S]: 0 at a row of the loss; 1 to ``reach`` at its context: a position i with a row of the loss among
            i + 1 to i + reach, with no beginning of a document among i + 1 to that row; S at every other one.
    """
    length = loss.shape[1]
    position = torch.arange(length, device=loss.device)
    following = torch.where(loss, position, length).flip(1).cummin(1).values.flip(1)
    distance = following - position
    near = (following < length) & (distance <= reach)
    if starts is not None:
        document = starts.cumsum(1).expand_as(loss)
        near &= document == document.gather(1, following.clamp(max=length - 1))
    if real is not None:
        near &= real
    return torch.where(near | loss, distance, length)


context_distance = define_composite(
    "context_distance(Tensor loss, Tensor? starts, Tensor? real, SymInt reach) -> Tensor", context_distance_reference
)
