"""The gradient of routing weights, from what the kernels leave for every row. Plain PyTorch: Triton is not imported."""

from __future__ import annotations

import torch
from torch import Tensor


def routing_gradient(parts: Tensor, position: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Gradient of ``weights`` [tokens, top_k], of their dtype.

    ``parts``: float32 [column tiles, rows], whose sum over the tiles is the gradient of a row's weight; rows are in the
    order of their experts. ``position`` and ``offsets``: int32 [tokens * top_k] and [experts + 1], as
    ``cggr::moe_permute`` returns them.
    """
    place = position.long()
    found = torch.where(place < offsets[-1], parts.sum(0)[place], 0.0)  # unwritten without an expert
    return found.view(weights.shape).to(weights.dtype)
