"""``cggr::gradient_moments``: sums over the rows that carry loss, of how large their gradients are."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.library import define_composite

MOMENTS = 5


def gradient_moments_reference(norms: Tensor, weights: Tensor) -> Tensor:
    """float32 [5]: the number of rows, and the sums of w, w g, w g^2 and w^2 g^2 over them.

    With w = 1 / p those of w, w g and w g^2 estimate, without a bias, sums of 1, g and g^2 over all candidates; that of
    w^2 g^2 estimates the sum of g^2 / p.

    Args:
        norms: g, floats [B, K], see ``cggr::gradient_norms``. weights: w, float32 [B, K], 0 at an unused slot. A row
            whose g is not finite, as after an overflow in float16, counts nothing.
    """
    counts = (weights > 0.0) & norms.isfinite()
    w = torch.where(counts, weights, 0.0).float()
    g = torch.where(counts, norms, 0.0).float()
    return torch.stack([each.sum() for each in (counts.float(), w, w * g, w * g.square(), (w * g).square())])


gradient_moments = define_composite(
    "gradient_moments(Tensor norms, Tensor weights) -> Tensor", gradient_moments_reference
)
