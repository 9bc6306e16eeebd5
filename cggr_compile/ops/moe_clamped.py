"""``cggr::moe_clamped_mlp``: ``moe_mlp`` for the experts of gpt-oss, which have biases and a clamped SwiGLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cggr_compile.ops.library import LIBRARY, define_composite, define_opaque, runs_kernels
from cggr_compile.ops.moe import _segments, _wide
from cggr_compile.ops.moe_routing import moe_permute


def moe_clamped_reference(
    hidden: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    weights: Tensor,
    experts: Tensor,
    alpha: float,
    limit: float,
) -> Tensor:
    """``out[t] = sum_j weights[t, j] * (down[e] act(gate_up[e] x_t + gate_up_bias[e]) + down_bias[e])``.

    ``act(z) = (u + 1) * g * sigmoid(alpha * g)`` with ``g = min(z[::2], limit)`` and ``u = clamp(z[1::2], -limit,
    limit)``, as in gpt-oss (arXiv 2508.10925).

    Args:
        hidden: [N, H]. gate_up: [E, 2 * I, H], rows of gate and up in turn. down: [E, H, I]. One float dtype.
        gate_up_bias: [E, 2 * I]. down_bias: [E, H]. weights: [N, top_k].
        experts: integers [N, top_k], e; one outside [0, E) means no expert and adds nothing.

    Returns:
        [N, H] of the dtype of ``hidden``; differentiable in the first six arguments.
    """
    differentiable = (hidden, gate_up, gate_up_bias, down, down_bias, weights)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    permuted = moe_permute(experts, gate_up.shape[0])
    out: Tensor = moe_clamped_mlp(*differentiable, *permuted, alpha, limit, save)[0]
    return out


def _parts(inner: Tensor, alpha: float, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Clamped gate, its sigmoid, and clamped up plus one."""
    inner = _wide(inner)
    gate, up = inner[:, ::2].clamp(max=limit), inner[:, 1::2].clamp(-limit, limit)
    return gate, torch.sigmoid(alpha * gate), up + 1


def moe_clamped_mlp_reference(
    hidden: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    weights: Tensor,
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
    alpha: float,
    limit: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`moe_clamped_reference` after the permutation; returns (out, inner) as ``moe_mlp`` does."""
    (tokens, top_k), rows = weights.shape, order.shape[0]
    inner, products = hidden.new_zeros(rows, gate_up.shape[1]), hidden.new_zeros(rows, hidden.shape[1])
    for expert, part in _segments(offsets):
        inner[part] = hidden[order[part] // top_k] @ gate_up[expert].T + gate_up_bias[expert]
        gate, sigmoid, up = _parts(inner[part], alpha, limit)
        products[part] = (up * gate * sigmoid).to(hidden.dtype) @ down[expert].T + down_bias[expert]
    terms = _wide(products[position].view(tokens, top_k, hidden.shape[1])) * weights[..., None].to(_wide(hidden).dtype)
    return terms.sum(1).to(hidden.dtype), inner if save else inner[:0].clone()


def moe_clamped_mlp_backward_reference(
    grad: Tensor,
    hidden: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    weights: Tensor,
    inner: Tensor,
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
    alpha: float,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first six arguments of the forward. ``grad``: [N, H], of ``out``."""
    (tokens, top_k), rows = weights.shape, order.shape[0]
    by_assignment = _wide(weights.reshape(-1, 1)).to(_wide(hidden).dtype)
    d_rows, d_weights = hidden.new_zeros(rows, hidden.shape[1]), torch.zeros_like(by_assignment)
    d_gate_up, d_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    d_gate_up_bias, d_down_bias = torch.zeros_like(gate_up_bias), torch.zeros_like(down_bias)
    for expert, part in _segments(offsets):
        token, assignment = order[part] // top_k, order[part].long()
        upstream, weight = grad[token], by_assignment[assignment]
        gate, sigmoid, up = _parts(inner[part], alpha, limit)
        activation = up * gate * sigmoid
        d_activation = _wide(upstream @ down[expert])
        by_bias = (_wide(upstream) * _wide(down_bias[expert])).sum(-1, keepdim=True)
        d_weights[assignment] = (d_activation * activation).sum(-1, keepdim=True) + by_bias
        d_down[expert] = upstream.T @ (weight * activation).to(hidden.dtype)
        d_down_bias[expert] = (weight * _wide(upstream)).sum(0).to(down_bias.dtype)
        d_activation = d_activation * weight
        raw = _wide(inner[part])
        d_gate = d_activation * up * sigmoid * (1 + alpha * gate * (1 - sigmoid)) * (raw[:, ::2] <= limit)
        d_up = d_activation * gate * sigmoid * (raw[:, 1::2].abs() <= limit)
        d_inner = torch.stack([d_gate, d_up], -1).flatten(1)
        d_gate_up_bias[expert] = d_inner.sum(0).to(gate_up_bias.dtype)
        d_inner = d_inner.to(hidden.dtype)
        d_gate_up[expert] = d_inner.T @ hidden[token]
        d_rows[part] = d_inner @ gate_up[expert]
    d_hidden = _wide(d_rows[position].view(tokens, top_k, hidden.shape[1])).sum(1).to(hidden.dtype)
    d_weights = d_weights.view(tokens, top_k).to(weights.dtype)
    return d_hidden, d_gate_up, d_gate_up_bias, d_down, d_down_bias, d_weights


def _fake(hidden: Tensor, gate_up: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    order, save = arguments[4], arguments[-1]
    return hidden.new_empty(hidden.shape), hidden.new_empty(order.shape[0] if save else 0, gate_up.shape[1])


def _fake_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    # torch.zeros_like keeps the strides of a matrix that is stored transposed
    hidden, *matrices, weights = arguments[:6]
    return hidden.new_empty(hidden.shape), *map(torch.empty_like, matrices), weights.new_empty(weights.shape)


def _cuda(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    if not runs_kernels(hidden):
        return moe_clamped_mlp_reference(hidden, *arguments)
    from cggr_compile.kernels.moe_clamped import moe_clamped_mlp_triton

    return moe_clamped_mlp_triton(hidden, *arguments)


def _backward_cuda(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not runs_kernels(grad):
        return moe_clamped_mlp_backward_reference(grad, *arguments)
    from cggr_compile.kernels.moe_clamped import moe_clamped_mlp_backward_triton

    return moe_clamped_mlp_backward_triton(grad, *arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, alpha, limit, save = inputs
    if not save:
        raise RuntimeError("moe_clamped_mlp was called with save=False, and a gradient of it is wanted")
    ctx.save_for_backward(*tensors[:6], output[1], *tensors[6:])
    ctx.numbers = alpha, limit
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    return (*moe_clamped_mlp_backward(grad, *ctx.saved_tensors, *ctx.numbers), *(None,) * 6)


_MATRICES = "Tensor hidden, Tensor gate_up, Tensor gate_up_bias, Tensor down, Tensor down_bias, Tensor weights"
moe_clamped_mlp = define_opaque(
    f"moe_clamped_mlp({_MATRICES}, Tensor order, Tensor position, Tensor offsets, float alpha, float limit, bool save)"
    " -> (Tensor, Tensor)",
    moe_clamped_mlp_reference,
    _fake,
)
moe_clamped_mlp_backward = define_opaque(
    f"moe_clamped_mlp_backward(Tensor grad, {_MATRICES}, Tensor inner, Tensor order, Tensor position, Tensor offsets,"
    " float alpha, float limit) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    moe_clamped_mlp_backward_reference,
    _fake_backward,
)
torch.library.register_autograd("cggr::moe_clamped_mlp", _backward, setup_context=_setup_context, lib=LIBRARY)
# importing Triton waits for the first call on a device
LIBRARY.impl("moe_clamped_mlp", _cuda, "CUDA")
LIBRARY.impl("moe_clamped_mlp_backward", _backward_cuda, "CUDA")
moe_clamped = define_composite(
    f"moe_clamped({_MATRICES}, Tensor experts, float alpha, float limit) -> Tensor", moe_clamped_reference
)
