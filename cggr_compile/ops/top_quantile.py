"""``cggr::top_quantile``: the candidates whose values are among the highest of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.library import define_composite


def top_quantile_reference(values: Tensor, valid: Tensor, share: float) -> Tensor:
    """Every candidate that is not below the quantile ``1 - share`` of all, and the next lower one or two.

    ``torch.quantile`` lies between two neighbours of the sorted values. The lower one of these, and one more for what
    rounding may do to it, are taken as well, so that ``values >= torch.quantile(values[valid], 1 - share)`` is always a
    part of what is returned.

    Args:
        values: float [B, S]; NaN is below everything. valid: bool [B, S], the candidates. share: in (0, 1].

    Returns:
        bool [B, S]. Equal values are taken or left together.
    """
    lowest = torch.full_like(values, -torch.inf)
    values = torch.where(valid & ~values.isnan(), values, lowest)
    count = valid.sum()
    below = torch.floor((1.0 - share) * (count - 1).double()).long() - 1  # of the candidates, in ascending order
    ordered = values.reshape(-1).sort(descending=True).values
    threshold = ordered.gather(0, (count - 1 - below.clamp(min=0)).clamp(min=0).reshape(1))
    return valid & (values >= threshold)


top_quantile = define_composite(
    "top_quantile(Tensor values, Tensor valid, float share) -> Tensor", top_quantile_reference
)
