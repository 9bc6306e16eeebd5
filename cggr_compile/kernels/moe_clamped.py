"""``cggr::moe_clamped_mlp`` and its backward as sequences of Triton kernels: the experts of gpt-oss.

The grouped products are those of ``moe_mlp``. Biases are added where a product is stored; the clamped SwiGLU, whose
gate and up alternate, is a kernel of its own between the products. Nothing is added atomically.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cggr_compile.kernels.common import contiguous_rows
from cggr_compile.kernels.moe import combine
from cggr_compile.kernels.moe_products import multiply_rows, stored_transposed
from cggr_compile.kernels.moe_weight_gradient import weight_gradient
from cggr_compile.kernels.routing_gradient import biased_routing_gradient

ROWS, COLUMNS = 16, 128  # of a tile of the elementwise kernels


@triton.jit
def _gate_and_up(inner_ptr, row, low, inside, width, alpha, limit, BLOCK_N: tl.constexpr):
    """Of some columns: gate and up as they were, the clamped gate, its sigmoid, and the clamped up plus one."""
    column = 2 * low + tl.arange(0, 2 * BLOCK_N)
    at = row.to(tl.int64)[:, None] * (2 * width) + column[None, :]
    pairs = tl.load(inner_ptr + at, mask=inside[:, None] & (column < 2 * width)[None, :], other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(pairs, [row.shape[0], BLOCK_N, 2]))
    # comparisons, not minima: what is not a number stays so
    held = tl.where(gate > limit, limit, gate)
    above = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
    return gate, up, held, tl.sigmoid(alpha * held), above


@triton.jit
def _activation_kernel(
    inner_ptr, out_ptr, routed_ptr, width, alpha, limit, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    low = tl.program_id(1) * BLOCK_N
    inside = row < tl.load(routed_ptr)
    _, _, gate, sigmoid, up = _gate_and_up(inner_ptr, row, low, inside, width, alpha, limit, BLOCK_N)
    column = low + tl.arange(0, BLOCK_N)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out_ptr + at, up * gate * sigmoid, mask=inside[:, None] & (column < width)[None, :])


@triton.jit
def _activation_backward_kernel(
    grad_ptr, inner_ptr, weights_ptr, order_ptr, routed_ptr, weighted_ptr, d_inner_ptr, d_weights_ptr,
    width, alpha, limit, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < tl.load(routed_ptr)
    assignment = tl.load(order_ptr + row, mask=inside, other=0)
    weight = tl.load(weights_ptr + assignment).to(tl.float32)[:, None]
    d_weight = tl.zeros([BLOCK_M], tl.float32)
    for low in range(0, width, BLOCK_N):
        raw_gate, raw_up, gate, sigmoid, up = _gate_and_up(inner_ptr, row, low, inside, width, alpha, limit, BLOCK_N)
        column = low + tl.arange(0, BLOCK_N)
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        mask = inside[:, None] & (column < width)[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        activation = up * gate * sigmoid
        d_weight += tl.sum(grad * activation, 1)
        tl.store(weighted_ptr + at, activation * weight, mask=mask)
        grad *= weight
        d_gate = grad * up * sigmoid * (1.0 + alpha * gate * (1.0 - sigmoid))
        d_gate = tl.where(raw_gate > limit, 0.0, d_gate)
        d_up = tl.where(tl.abs(raw_up) > limit, 0.0, grad * gate * sigmoid)
        pairs = tl.reshape(tl.join(d_gate, d_up), [BLOCK_M, 2 * BLOCK_N])
        column = 2 * low + tl.arange(0, 2 * BLOCK_N)
        at = row.to(tl.int64)[:, None] * (2 * width) + column[None, :]
        tl.store(d_inner_ptr + at, pairs, mask=inside[:, None] & (column < 2 * width)[None, :])
    tl.store(d_weights_ptr + row, d_weight, mask=inside)


@triton.jit
def _expert_sums_kernel(
    rows_ptr, row_stride, weights_ptr, order_ptr, offsets_ptr, out_ptr, N,
    TOP_K: tl.constexpr, OF_TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offsets_ptr + expert + 1)
    total = tl.zeros([BLOCK_N], tl.float32)
    for low in range(tl.load(offsets_ptr + expert), end, BLOCK_M):
        row = low + tl.arange(0, BLOCK_M)
        source = row
        if OF_TOKENS:
            assignment = tl.load(order_ptr + row, mask=row < end, other=0)
            source = assignment // TOP_K
        at = rows_ptr + source.to(tl.int64)[:, None] * row_stride + column[None, :]
        values = tl.load(at, mask=(row < end)[:, None] & (column < N)[None, :], other=0.0).to(tl.float32)
        if OF_TOKENS:
            values *= tl.load(weights_ptr + assignment).to(tl.float32)[:, None]
        total += tl.sum(values, 0)
    tl.store(out_ptr + expert.to(tl.int64) * N + column, total, mask=column < N)


def activation(inner: Tensor, offsets: Tensor, alpha: float, limit: float) -> Tensor:
    """[rows, I], of gate and up in turn, ``inner`` [rows, 2 * I]."""
    out = inner.new_empty(inner.shape[0], inner.shape[1] // 2)
    rows, width = out.shape
    grid = triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS)
    _activation_kernel[grid](inner, out, offsets[-1:], width, alpha, limit, BLOCK_M=ROWS, BLOCK_N=COLUMNS)
    return out


def activation_backward(
    grad: Tensor, inner: Tensor, weights: Tensor, order: Tensor, offsets: Tensor, alpha: float, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``cggr::moe_clamped_activation_backward``; ``weights`` is contiguous."""
    rows, width = grad.shape
    weighted, d_inner = inner.new_empty(rows, width), torch.empty_like(inner)
    by_row = torch.empty(rows, dtype=torch.float32, device=grad.device)
    _activation_backward_kernel[(triton.cdiv(rows, ROWS),)](
        *(grad, inner, weights, order, offsets[-1:], weighted, d_inner, by_row, width, alpha, limit),
        BLOCK_M=ROWS,
        BLOCK_N=COLUMNS,
    )
    return weighted, d_inner, by_row


def bias_gradient(
    bias: Tensor, rows: Tensor, offsets: Tensor, order: Tensor, top_k: int, weights: Tensor | None = None
) -> Tensor:
    """[E, N]: each expert's sum of ``rows`` [rows, N]; with ``weights``, ``rows`` is [tokens, N], each weighed."""
    out = torch.empty_like(bias, memory_format=torch.contiguous_format)
    grid = out.shape[0], triton.cdiv(out.shape[1], COLUMNS)
    rows = contiguous_rows(rows)
    _expert_sums_kernel[grid](
        *(rows, rows.stride(0), weights, order, offsets, out, out.shape[1]),
        TOP_K=top_k,
        OF_TOKENS=weights is not None,
        BLOCK_M=64,
        BLOCK_N=COLUMNS,
    )
    return out


def moe_clamped_mlp_triton(
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
    overrides: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> tuple[Tensor, Tensor]:
    """As the reference. ``overrides``: of ``multiply_rows``, by kernel."""
    rows, top_k, width = order.shape[0], weights.shape[1], down.shape[2]
    inner = hidden.new_empty(rows, 2 * width)
    if not rows:
        return torch.zeros_like(hidden), inner
    products = hidden.new_empty(rows, hidden.shape[1])
    shared: dict[str, Any] = dict(order=order, top_k=top_k, queues={})
    with torch.cuda.device_of(hidden):
        multiply_rows(
            "inner", hidden, gate_up, inner, offsets, bias=gate_up_bias, **shared, **overrides.get("inner", {})
        )
        multiply_rows(
            "down",
            activation(inner, offsets, alpha, limit),
            down,
            products,
            offsets,
            bias=down_bias,
            **shared,
            **overrides.get("down", {}),
        )
        out = combine(products, weights, position, offsets, top_k)
    return out, inner if save else inner[:0].clone()


def moe_clamped_mlp_backward_triton(
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
    overrides: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the reference. ``overrides``: of ``multiply_rows`` and ``weight_gradient``, by kernel."""
    rows, top_k, width = order.shape[0], weights.shape[1], down.shape[2]
    if not rows:
        of = (hidden, gate_up, gate_up_bias, down, down_bias, weights)
        return tuple(map(torch.zeros_like, of))  # type: ignore[return-value]
    by_assignment = weights.contiguous()
    d_activation, d_rows = grad.new_empty(rows, width), grad.new_empty(rows, grad.shape[1])
    shared: dict[str, Any] = dict(order=order, top_k=top_k, queues={})
    with torch.cuda.device_of(hidden):
        multiply_rows("d_activation", grad, down, d_activation, offsets, **shared, **overrides.get("d_activation", {}))
        backward = (d_activation, inner, by_assignment, order, offsets, alpha, limit)
        weighted, d_inner, by_row = activation_backward(*backward)
        multiply_rows("d_hidden", d_inner, gate_up, d_rows, offsets, **shared, **overrides.get("d_hidden", {}))
        d_gate_up = _matrix_gradient(gate_up, d_inner, hidden, False, order, offsets, top_k, overrides)
        d_down = _matrix_gradient(down, weighted, grad, True, order, offsets, top_k, overrides)
        d_gate_up_bias = bias_gradient(gate_up_bias, d_inner, offsets, order, top_k)
        d_down_bias = bias_gradient(down_bias, grad, offsets, order, top_k, by_assignment)
        d_hidden = combine(d_rows, None, position, offsets, top_k)
    d_weights = biased_routing_gradient(by_row, grad, down_bias, position, offsets, weights)
    return d_hidden, d_gate_up, d_gate_up_bias, d_down, d_down_bias, d_weights


def _matrix_gradient(
    matrices: Tensor,
    by_row: Tensor,
    by_token: Tensor,
    tokens_first: bool,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    overrides: Mapping[str, Mapping[str, Any]],
) -> Tensor:
    """The gradient of ``matrices`` [E, M, N], stored as they are; M belongs to ``by_token`` if ``tokens_first``."""
    transposed = stored_transposed(matrices)
    kernel = "d_down" if tokens_first != transposed else "d_gate_up"
    pair = (by_token, by_row) if kernel == "d_down" else (by_row, by_token)
    found = weight_gradient(kernel, *pair, order, offsets, top_k, **overrides.get(kernel, {}))
    return found.mT if transposed else found
