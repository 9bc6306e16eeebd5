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
    return _of_pairs(parts.sum(0), position, offsets, weights)


def biased_routing_gradient(
    by_row: Tensor, grad: Tensor, bias: Tensor, position: Tensor, offsets: Tensor, weights: Tensor
) -> Tensor:
    """The same where experts add a ``bias`` [experts, N] to what is weighed, and ``grad`` [tokens, N] is the sum's.

    ``by_row``: float32 [rows], the gradient of a row's weight but for the bias.
    """
    last = bias.shape[0] - 1
    expert = torch.searchsorted(offsets[1:], position, right=True).view(weights.shape).clamp_(max=last)
    by_bias = (grad.float() @ bias.float().t()).gather(1, expert)
    return _of_pairs(by_row, position, offsets, weights, by_bias.view(-1))


def _of_pairs(by_row: Tensor, position: Tensor, offsets: Tensor, weights: Tensor, more: Tensor | float = 0.0) -> Tensor:
    place = position.long()
    found = torch.where(place < offsets[-1], by_row[place] + more, 0.0)  # unwritten without an expert
    return found.view(weights.shape).to(weights.dtype)
