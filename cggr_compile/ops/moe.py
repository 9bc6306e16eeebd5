"""``cggr::moe_mlp``: the experts of a Mixture-of-Experts layer, from tokens to tokens.

gather -> grouped product -> SwiGLU (Shazeer, arXiv 2002.05202) -> grouped product -> routing weight -> un-permute,
with its backward as an operator of its own. The backward needs only what the first grouped product left behind: the
gradient of a routing weight is <dO W2, act>, so that neither the second product nor the activation is kept
(as in SonicMoE, arXiv 2512.14080).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cggr_compile.ops.library import LIBRARY, define_composite, define_opaque, runs_kernels
from cggr_compile.ops.moe_routing import moe_permute


def moe_reference(hidden: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """``out[t] = sum_j weights[t, j] * down[e] (silu(gate[e] x_t) * (up[e] x_t))`` with ``e = experts[t, j]``.

    Args:
        hidden: [N, H]. gate_up: [E, 2 * I, H], the gate's rows before the up rows. down: [E, H, I]. One float dtype.
        weights: [N, top_k], any float dtype.
        experts: integers [N, top_k]; one outside [0, E) means no expert and adds nothing.

    Returns:
        [N, H] of the dtype of ``hidden``; differentiable in the first four arguments.

    Raises:
        ValueError: naming the argument whose shape or dtype does not fit.
    """
    _check(hidden, gate_up, down, weights, experts)
    order, position, offsets = moe_permute(experts, gate_up.shape[0])
    differentiable = (hidden, gate_up, down, weights)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    out: Tensor = moe_mlp(*differentiable, order, position, offsets, save)[0]
    return out


def _check(hidden: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [tokens, features], got the shape {tuple(hidden.shape)}")
    if gate_up.dim() != 3 or gate_up.shape[1] % 2 or gate_up.shape[2] != hidden.shape[1]:
        raise ValueError(f"gate_up must be [experts, 2 * inner, {hidden.shape[1]}], got {tuple(gate_up.shape)}")
    wanted = (gate_up.shape[0], hidden.shape[1], gate_up.shape[1] // 2)
    if down.shape != wanted:
        raise ValueError(f"down must be {wanted}, got {tuple(down.shape)}")
    if experts.dim() != 2 or experts.shape[0] != hidden.shape[0] or experts.is_floating_point():
        raise ValueError(f"experts must be integers [{hidden.shape[0]}, top_k], got {tuple(experts.shape)}")
    if weights.shape != experts.shape or not weights.is_floating_point():
        raise ValueError(f"weights must be floats {tuple(experts.shape)}, got {tuple(weights.shape)}")
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        if tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}")


def _segments(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and its rows. Reads the offsets: on a GPU, which runs this without our kernels only
    (float64, ROCm), that waits for the device."""
    bounds = offsets.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start < end:
            yield expert, slice(start, end)


def _wide(tensor: Tensor) -> Tensor:
    """As the kernels compute between products: in float32, or better."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def moe_mlp_reference(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`moe_reference` after the permutation (see ``moe_permute``).

    Returns:
        out: [N, H].
        inner: [N * top_k, 2 * I], what gate and up gave, in the order of the experts, for the backward; rows
        without an expert are unspecified. [0, 2 * I] without ``save``.
    """
    (tokens, top_k), rows = weights.shape, order.shape[0]
    inner = hidden.new_zeros(rows, gate_up.shape[1])
    products = hidden.new_zeros(rows, hidden.shape[1])
    for expert, part in _segments(offsets):
        inner[part] = hidden[order[part] // top_k] @ gate_up[expert].T
        gate, up = _wide(inner[part]).chunk(2, -1)
        products[part] = (torch.nn.functional.silu(gate) * up).to(hidden.dtype) @ down[expert].T
    terms = _wide(products[position].view(tokens, top_k, hidden.shape[1])) * weights[..., None].to(_wide(hidden).dtype)
    return terms.sum(1).to(hidden.dtype), inner if save else inner[:0].clone()


def moe_mlp_backward_reference(
    grad: Tensor,
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    inner: Tensor,
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, gate_up, down and weights. ``grad``: [N, H], of ``out``; the others as in the forward."""
    (tokens, top_k), rows = weights.shape, order.shape[0]
    by_assignment = _wide(weights.reshape(-1, 1)).to(_wide(hidden).dtype)
    d_rows = hidden.new_zeros(rows, hidden.shape[1])
    d_gate_up, d_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    d_weights = torch.zeros_like(by_assignment)
    for expert, part in _segments(offsets):
        token, assignment = order[part] // top_k, order[part].long()
        upstream, weight = grad[token], by_assignment[assignment]
        gate, up = _wide(inner[part]).chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        activation = gate * sigmoid * up
        d_activation = _wide(upstream @ down[expert])
        d_weights[assignment] = (d_activation * activation).sum(-1, keepdim=True)
        d_down[expert] = upstream.T @ (weight * activation).to(hidden.dtype)
        d_activation = d_activation * weight
        d_gate = d_activation * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_inner = torch.cat([d_gate, d_activation * gate * sigmoid], -1).to(hidden.dtype)
        d_gate_up[expert] = d_inner.T @ hidden[token]
        d_rows[part] = d_inner @ gate_up[expert]
    d_hidden = _wide(d_rows[position].view(tokens, top_k, hidden.shape[1])).sum(1).to(hidden.dtype)
    return d_hidden, d_gate_up, d_down, d_weights.view(tokens, top_k).to(weights.dtype)


def _fake(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(order.shape[0] if save else 0, gate_up.shape[1])


def _fake_backward(
    grad: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_hidden, d_gate_up, d_down, d_weights = (
        tensor.new_empty(tensor.shape) for tensor in (hidden, gate_up, down, weights)
    )
    return d_hidden, d_gate_up, d_down, d_weights


def _moe_mlp_cuda(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    if not runs_kernels(hidden):
        return moe_mlp_reference(hidden, *arguments)
    from cggr_compile.kernels.moe import moe_mlp_triton

    return moe_mlp_triton(hidden, *arguments)


def _moe_mlp_backward_cuda(grad: Tensor, hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not runs_kernels(hidden):
        return moe_mlp_backward_reference(grad, hidden, *arguments)
    from cggr_compile.kernels.moe import moe_mlp_backward_triton

    return moe_mlp_backward_triton(grad, hidden, *arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, gate_up, down, weights, order, position, offsets, save = inputs
    if not save:
        raise RuntimeError("moe_mlp was called with save=False, and a gradient of it is wanted")
    ctx.save_for_backward(hidden, gate_up, down, weights, output[1], order, position, offsets)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    return (*moe_mlp_backward(grad, *ctx.saved_tensors), None, None, None, None)


moe_mlp = define_opaque(
    "moe_mlp(Tensor hidden, Tensor gate_up, Tensor down, Tensor weights, Tensor order, Tensor position,"
    " Tensor offsets, bool save) -> (Tensor, Tensor)",
    moe_mlp_reference,
    _fake,
)
moe_mlp_backward = define_opaque(
    "moe_mlp_backward(Tensor grad, Tensor hidden, Tensor gate_up, Tensor down, Tensor weights, Tensor inner,"
    " Tensor order, Tensor position, Tensor offsets) -> (Tensor, Tensor, Tensor, Tensor)",
    moe_mlp_backward_reference,
    _fake_backward,
)
torch.library.register_autograd("cggr::moe_mlp", _backward, setup_context=_setup_context, lib=LIBRARY)
# importing Triton waits for the first call on a device
LIBRARY.impl("moe_mlp", _moe_mlp_cuda, "CUDA")
LIBRARY.impl("moe_mlp_backward", _moe_mlp_backward_cuda, "CUDA")
moe = define_composite(
    "moe(Tensor hidden, Tensor gate_up, Tensor down, Tensor weights, Tensor experts) -> Tensor", moe_reference
)
