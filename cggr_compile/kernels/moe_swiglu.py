"""SwiGLU (arXiv 2002.05202) and its derivative, applied to the tile of a grouped product before it is stored."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from cggr_compile.kernels.ragged import store_until


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def store_tile(out_ptr, value, first, end, low, row, column, inside, width, DTYPE: tl.constexpr, STORES: tl.constexpr):
    """Stores a tile of a matrix [rows, width] at the row ``first`` and the column ``low``, but no row from ``end`` on.

    STORES: by TMA, while the next tile is computed; ``out_ptr`` is then a ragged descriptor, and columns are not cut.
    """
    if STORES:
        store_until(out_ptr, first, end, low, value.to(DTYPE))
    else:
        tl.store(out_ptr + row.to(tl.int64)[:, None] * width + column[None, :], value, mask=inside)


@triton.jit
def through_swiglu(
    gate, up, first, end, low, row, column, inside, inner_ptr, N,
    DTYPE: tl.constexpr, SAVE: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of a tile; ``inner`` [rows, 2 N] gets gate and up, beside each other, if SAVE."""
    gate = gate.to(DTYPE)  # rounded as it is saved: the backward sees what the forward saw
    up = up.to(DTYPE)
    if SAVE:
        store_tile(inner_ptr, gate, first, end, low, row, column, inside, 2 * N, DTYPE, STORES)
        store_tile(inner_ptr, up, first, end, low + N, row, column + N, inside, 2 * N, DTYPE, STORES)
    gate = gate.to(tl.float32)
    return gate * tl.sigmoid(gate) * up.to(tl.float32)


@triton.jit
def _back_through_some(
    d_activation, column, row, end, weight, inner_ptr, d_inner_ptr, out_ptr, N, EVEN_N: tl.constexpr
):  # fmt: skip
    """Back through SwiGLU for some columns of a tile; returns their share of the gradient of the routing weights."""
    inside = (row < end)[:, None]
    if not EVEN_N:
        inside = inside & (column < N)[None, :]
    at = row.to(tl.int64)[:, None] * N + column[None, :]
    gate_at = row.to(tl.int64)[:, None] * (2 * N) + column[None, :]
    gate = tl.load(inner_ptr + gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(inner_ptr + gate_at + N, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_weight = tl.sum(d_activation * silu * up, 1)
    tl.store(out_ptr + at, silu * up * weight[:, None], mask=inside)
    d_activation *= weight[:, None]
    tl.store(d_inner_ptr + gate_at, d_activation * up * sigmoid * (1.0 + gate - silu), mask=inside)
    tl.store(d_inner_ptr + gate_at + N, d_activation * silu, mask=inside)
    return d_weight


@triton.jit
def back_through_swiglu(
    d_activation, column_tile, row, end, order_ptr, weights_ptr, inner_ptr, d_inner_ptr, out_ptr, N,
    EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores a tile of ``d_inner`` and of the activation times its routing weight; returns [BLOCK_M] as above."""
    assignment = tl.load(order_ptr + row, mask=row < end, other=0)
    weight = tl.load(weights_ptr + assignment).to(tl.float32)
    # a quarter of the columns, one after the other: the whole tile's gate, up and gradients need many registers
    d_weight = tl.zeros([BLOCK_M], tl.float32)
    left, right = halves(d_activation)
    for half in tl.static_range(2):
        quarters = halves(left if half == 0 else right)
        for quarter in tl.static_range(2):
            start = column_tile * BLOCK_N + (2 * half + quarter) * (BLOCK_N // 4)
            d_weight += _back_through_some(
                quarters[quarter], start + tl.arange(0, BLOCK_N // 4), row, end, weight,
                inner_ptr, d_inner_ptr, out_ptr, N, EVEN_N
            )  # fmt: skip
    return d_weight
