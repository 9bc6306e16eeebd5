"""SwiGLU and its derivative between grouped products that a library makes; fused into our own, see ``moe_products``.

The specifications are ``moe_swiglu`` and ``moe_swiglu_backward`` in ``cggr_compile.ops.moe_steps``.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 128  # of a tile


@triton.jit
def _gate_and_up(inner_ptr, row, column, mask, width):
    at = row.to(tl.int64)[:, None] * (2 * width) + column[None, :]
    gate = tl.load(inner_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(inner_ptr + at + width, mask=mask, other=0.0).to(tl.float32)
    return at, gate, up


@triton.jit
def _gate_kernel(inner_ptr, out_ptr, routed_ptr, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < tl.load(routed_ptr))[:, None] & (column < width)[None, :]
    _, gate, up = _gate_and_up(inner_ptr, row, column, mask, width)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out_ptr + at, gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def _gate_backward_kernel(
    grad_ptr, inner_ptr, weights_ptr, order_ptr, routed_ptr, weighted_ptr, d_inner_ptr, parts_ptr, rows, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < tl.load(routed_ptr)
    mask = inside[:, None] & (column < width)[None, :]
    gate_at, gate, up = _gate_and_up(inner_ptr, row, column, mask, width)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    assignment = tl.load(order_ptr + row, mask=inside, other=0)
    weight = tl.load(weights_ptr + assignment, mask=inside, other=0.0).to(tl.float32)[:, None]
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(parts_ptr + tl.program_id(1).to(tl.int64) * rows + row, tl.sum(grad * silu * up, 1), mask=inside)
    tl.store(weighted_ptr + at, silu * up * weight, mask=mask)
    grad *= weight
    tl.store(d_inner_ptr + gate_at, grad * up * sigmoid * (1.0 + gate - silu), mask=mask)
    tl.store(d_inner_ptr + gate_at + width, grad * silu, mask=mask)


def gate_triton(inner: Tensor, out: Tensor, offsets: Tensor) -> None:
    """``out`` [rows, I] gets silu(gate) * up of ``inner`` [rows, 2 * I]."""
    rows, width = out.shape
    grid = triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS)
    _gate_kernel[grid](inner, out, offsets[-1:], width, BLOCK_M=ROWS, BLOCK_N=COLUMNS)


def gate_backward_triton(
    grad: Tensor,
    inner: Tensor,
    weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    weighted: Tensor,
    d_inner: Tensor,
    parts: Tensor,
) -> None:
    """From ``grad`` [rows, I]: fills ``weighted``, ``d_inner`` and ``parts``, [rows, I], [rows, 2 * I] and
    [column tiles, rows]."""
    rows, width = weighted.shape
    grid = triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS)
    _gate_backward_kernel[grid](
        *(grad, inner, weights, order, offsets[-1:], weighted, d_inner, parts, rows, width),
        BLOCK_M=ROWS,
        BLOCK_N=COLUMNS,
    )
