"""Which experts a token goes to, and the rows sorted by expert: ``cggr::moe_top_experts``, ``cggr::moe_permute``.

An *assignment* is a pair (token, one of its top-k experts), numbered ``token * top_k + slot``. Sizes depend on shapes
alone, and nothing waits for the device: an expert's number of rows stays a number on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.compat import runs_our_kernels
from cggr_compile.ops.library import LIBRARY, define_opaque, runs_kernels


def moe_top_experts_reference(scores: Tensor, top_k: int) -> Tensor:
    """The ``top_k`` best experts of every token.

    Args:
        scores: [N, E], any float dtype. top_k: 1 to E.

    Returns:
        int64 [N, top_k], distinct, best first; of equal scores the lower expert comes first. Unspecified, but
        distinct and in [0, E), where scores are NaN. Take the scores themselves with ``scores.gather(1, experts)``:
        that is where their gradient flows.
    """
    return scores.sort(stable=True, dim=1, descending=True).indices[:, :top_k].contiguous()


def moe_permute_reference(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort assignments by expert, stably.

    Args:
        experts: integers [N, top_k]; one outside [0, num_experts) means no expert (null routing).

    Returns:
        order: int32 [N * top_k], the assignments in the order of their experts, those without an expert last.
        position: int32 [N * top_k], its inverse: ``order[position[a]] == a``.
        offsets: int32 [num_experts + 1]: expert e has the rows ``offsets[e]`` to ``offsets[e + 1]`` of the order.
    """
    flat = experts.reshape(-1)
    key = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    ordered, order = key.sort(stable=True)
    rows = torch.arange(flat.numel(), device=flat.device)
    position = torch.empty_like(order).scatter_(0, order, rows)
    bounds = torch.arange(num_experts + 1, device=flat.device, dtype=ordered.dtype)
    offsets = torch.searchsorted(ordered, bounds)
    return order.int(), position.int(), offsets.int()


def _fake_top_experts(scores: Tensor, top_k: int) -> Tensor:
    return scores.new_empty(scores.shape[0], top_k, dtype=torch.int64)


def _fake_permute(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = experts.shape[0] * experts.shape[1]
    sizes = (rows, rows, num_experts + 1)
    order, position, offsets = (experts.new_empty(size, dtype=torch.int32) for size in sizes)
    return order, position, offsets


def _top_experts_cuda(scores: Tensor, top_k: int) -> Tensor:
    if not runs_kernels(scores):
        return moe_top_experts_reference(scores, top_k)
    from cggr_compile.kernels.moe_routing import top_experts_triton

    return top_experts_triton(scores, top_k)


def _permute_cuda(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_our_kernels():
        return moe_permute_reference(experts, num_experts)
    from cggr_compile.kernels.moe_routing import permute_triton

    return permute_triton(experts, num_experts)


moe_top_experts = define_opaque(
    "moe_top_experts(Tensor scores, int top_k) -> Tensor", moe_top_experts_reference, _fake_top_experts
)
moe_permute = define_opaque(
    "moe_permute(Tensor experts, int num_experts) -> (Tensor, Tensor, Tensor)", moe_permute_reference, _fake_permute
)
# importing Triton waits for the first call on a device
LIBRARY.impl("moe_top_experts", _top_experts_cuda, "CUDA")
LIBRARY.impl("moe_permute", _permute_cuda, "CUDA")
