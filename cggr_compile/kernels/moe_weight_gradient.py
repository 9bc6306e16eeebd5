"""Triton kernels for the gradient of every expert's matrix: sums of outer products of its rows.

The number of their tiles depends on shapes alone. Where TMA loads rows, those of one factor are gathered before and a
program per multiprocessor goes through the tiles; elsewhere each tile has its own program, which gathers as it loads.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cggr_compile.kernels import moe_tiles
from cggr_compile.kernels.common import contiguous_rows, for_interpreter, grouped_tile, has_descriptors, precision
from cggr_compile.kernels.moe_gather import gather_rows
from cggr_compile.kernels.moe_products import programs
from cggr_compile.kernels.ragged import load_until, ragged


@triton.jit
def weight_gradient_tile(
    number, left_ptr, left_stride, right_ptr, right_stride, order_ptr, offsets_ptr, M, N,
    TOP_K: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The tile of this number: its expert, its rows [BLOCK_M] and columns [BLOCK_N] of the gradient, and the sum."""
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    expert = number // (row_tiles * column_tiles)
    tile = number % (row_tiles * column_tiles)
    row_tile, column_tile = grouped_tile(tile, row_tiles, column_tiles, GROUP)
    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for low in range(start, end, BLOCK_K):
        row = low + tl.arange(0, BLOCK_K)
        inside = (row < end)[:, None]
        token = row
        if GATHER_LEFT or GATHER_RIGHT:
            token = tl.load(order_ptr + row, mask=row < end, other=0) // TOP_K
        left_row = token if GATHER_LEFT else row
        right_row = token if GATHER_RIGHT else row
        left_at = left_ptr + left_row.to(tl.int64)[:, None] * left_stride + m[None, :]
        right_at = right_ptr + right_row.to(tl.int64)[:, None] * right_stride + n[None, :]
        # both are masked: what lies past the last expert's rows may be NaN
        if EVEN:
            left = tl.load(left_at, mask=inside, other=0.0)
            right = tl.load(right_at, mask=inside, other=0.0)
        else:
            left = tl.load(left_at, mask=inside & (m < M)[None, :], other=0.0)
            right = tl.load(right_at, mask=inside & (n < N)[None, :], other=0.0)
        acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
    return expert, m, n, acc


@triton.jit
def _weight_gradient_kernel(
    left_ptr, left_stride, right_ptr, right_stride, out_ptr, order_ptr, offsets_ptr, M, N,
    TOP_K: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    expert, m, n, acc = weight_gradient_tile(
        tl.program_id(0), left_ptr, left_stride, right_ptr, right_stride, order_ptr, offsets_ptr, M, N,
        TOP_K, GATHER_LEFT, GATHER_RIGHT, EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP
    )  # fmt: skip
    at = out_ptr + expert.to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    if EVEN:
        tl.store(at, acc)
    else:
        tl.store(at, acc, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _streamed_weight_gradient_kernel(
    left, right, out, offsets_ptr, E, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As ``_weight_gradient_kernel`` of rows in their order, by TMA; past the expert's last row both factors are 0."""
    row_tiles: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    column_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    for number in tl.range(tl.program_id(0), E * row_tiles * column_tiles, tl.num_programs(0)):
        expert = number // (row_tiles * column_tiles)
        row_tile, column_tile = grouped_tile(number % (row_tiles * column_tiles), row_tiles, column_tiles, GROUP)
        m, n = row_tile * BLOCK_M, column_tile * BLOCK_N
        start = tl.load(offsets_ptr + expert)
        end = tl.load(offsets_ptr + expert + 1)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for low in range(start, end, BLOCK_K):
            acc = tl.dot(
                load_until(left, low, end, m).T, load_until(right, low, end, n), acc, input_precision=PRECISION
            )
        out.store([expert, m, n], acc.to(out.dtype).reshape(1, BLOCK_M, BLOCK_N))


def weight_gradient(
    kernel: str,
    left: Tensor,
    right: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    top_k: int,
    gathered: bool = False,
    **overrides: Any,
) -> Tensor:
    """[E, M, N]: ``sum_r left[r]^T right[r]`` over the rows r of every expert e; zero without rows.

    Args:
        kernel: ``d_gate_up``: left is [rows, M], right [tokens, N]. ``d_down``: left is [tokens, M], right [rows, N].
            Row r of what is [tokens, ...] is that of the token order[r] // top_k.
        gathered: both hold rows already; ``order`` may be None.
        overrides: of ``moe_tiles.configuration``, and of DESCRIPTORS: load by TMA, for which rows are gathered before.
    """
    left, right = contiguous_rows(left), contiguous_rows(right)
    experts, m, n = offsets.shape[0] - 1, left.shape[1], right.shape[1]
    out = left.new_empty(experts, m, n)
    gathers_left, gathers_right = (not gathered and kernel == name for name in ("d_down", "d_gate_up"))
    streams = left.element_size() == 2 and all(map(has_descriptors, (left, right, out)))
    config = {**moe_tiles.configuration(kernel, left.dtype, n if streams else 0), **overrides}
    block_m, block_n, block_k = (config[f"BLOCK_{axis}"] for axis in "MNK")
    if config.pop("DESCRIPTORS", streams):
        if gathers_left or gathers_right:
            assert order is not None
            left = gather_rows(left, order, top_k) if gathers_left else left
            right = gather_rows(right, order, top_k) if gathers_right else right
        _streamed_weight_gradient_kernel[(programs(left),)](
            *(ragged(left, block_k, block_m), ragged(right, block_k, block_n)),
            *(TensorDescriptor.from_tensor(out, [1, block_m, block_n]), offsets, experts, m, n),
            PRECISION=precision(left.dtype),
            **config,
        )
        return out
    left, right = for_interpreter(left), for_interpreter(right)
    _weight_gradient_kernel[(experts * triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
        *(left, left.stride(0), right, right.stride(0), out, order, offsets, m, n),
        TOP_K=top_k,
        GATHER_LEFT=gathers_left,
        GATHER_RIGHT=gathers_right,
        EVEN=m % block_m == 0 and n % block_n == 0,
        PRECISION=precision(left.dtype),
        **config,
    )
    return out
