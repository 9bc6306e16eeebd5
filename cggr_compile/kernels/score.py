"""Triton kernel of ``cggr::score_partials``: one pass over the vocabulary, online reductions, no logits in memory.

The specification is ``cggr_compile.ops.score.score_partials_reference``. A program owns a block of rows and one span
of the vocabulary: it multiplies tile after tile of the head's weight and folds each into four running numbers per row
(online softmax, Milakov and Gimelshein, arXiv 1805.02867, with the second maximum and the entropy's sum beside it).

``score_block`` is the body of two kernels: the one here, and Inductor's template of ``lowerings/score.py``.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cggr_compile.kernels.common import INTERPRETED, LN2, LOG2E, contiguous_rows, grouped_tile
from cggr_compile.kernels.head_product import add_product, configurations, loads_by_tma, next_step, operands, row_starts

# Logit of a column past the end. Not -inf, whose product with its probability, zero, would be NaN.
NOWHERE = tl.constexpr(-1e30)


@triton.jit
def _top2(high, second, other_high, other_second):
    return tl.maximum(high, other_high), tl.maximum(tl.minimum(high, other_high), tl.maximum(second, other_second))


@triton.jit
def _fold(z, high, second, total, slope):
    """Adds a tile of logits [M, N] to the running maximum, second maximum, sum of exp2 and sum of exp2 * z."""
    tile_high, tile_second = tl.reduce((z, tl.full(z.shape, float("-inf"), tl.float32)), 1, _top2)
    new_high, second = _top2(high, second, tile_high, tile_second)
    weight = tl.exp2(z - new_high[:, None])
    factor = tl.exp2(high - new_high)
    slope = factor * slope + tl.sum(weight * z, 1)
    total = factor * total + tl.sum(weight, 1)
    return new_high, second, total, slope


@triton.jit
def score_block(
    x_ptr,
    x_stride,
    x_column,
    w_ptr,
    w_stride,
    bias_ptr,
    row_scale_ptr,
    column_scale_ptr,
    N,
    V,
    H,
    parts,
    scale,
    softcap,
    SPAN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_H: tl.constexpr,
    EVEN_V: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What this program computes: its part, its rows [BLOCK_M], and the four numbers of each row in that part."""
    block, part = grouped_tile(tl.program_id(0), tl.cdiv(N, BLOCK_M), parts, GROUP)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    # rows past the end read the last one
    x_rows = row_starts(x_ptr, x_stride, tl.minimum(row, N - 1).to(tl.int64)[:, None], DESCRIPTORS)
    steps = tl.cdiv(H, BLOCK_K)
    start = part * SPAN
    tiles = tl.cdiv(tl.minimum(SPAN, V - start), BLOCK_N)

    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    second = high
    total = tl.zeros([BLOCK_M], tl.float32)
    slope = total
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    low = start - BLOCK_N
    step = -1
    for _ in range(tiles * steps):
        step, low = next_step(step, low, steps, BLOCK_N)
        acc = add_product(
            acc, x_rows, x_column, w_ptr, w_stride, block * BLOCK_M, low, step, V, H,
            DESCRIPTORS, EVEN_H, PRECISION, BLOCK_N, BLOCK_K
        )  # fmt: skip
        if step == steps - 1:
            z = acc
            safe_column = tl.minimum(low + tl.arange(0, BLOCK_N), V - 1)
            if HAS_SCALES:
                z *= tl.load(row_scale_ptr + tl.minimum(row, N - 1))[:, None]
                z *= tl.load(column_scale_ptr + safe_column)[None, :]
            if HAS_BIAS:
                z += tl.load(bias_ptr + safe_column).to(tl.float32)[None, :]
            if SOFTCAP:
                # tanh(y) = 1 - 2 / (exp(2 y) + 1)
                z = (1.0 - 2.0 / (tl.exp2(z * (2.0 * LOG2E * scale / softcap)) + 1.0)) * (softcap * LOG2E)
            else:
                z *= scale * LOG2E
            if not EVEN_V:
                z = tl.where((low + tl.arange(0, BLOCK_N) < V)[None, :], z, NOWHERE)
            high, second, total, slope = _fold(z, high, second, total, slope)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    runner_up = tl.where(second > NOWHERE, second * LN2, float("-inf"))
    return part, row, high * LN2, total, (slope - high * total) * LN2, runner_up


# a count that happens to be 1 would otherwise be a constant, and no tensor
@triton.jit(do_not_specialize=["N", "V", "parts"])
def _score_kernel(
    x_ptr,
    x_stride,
    x_column,
    w_ptr,
    w_stride,
    bias_ptr,
    row_scale_ptr,
    column_scale_ptr,
    out_ptr,
    N,
    V,
    H,
    parts,
    scale,
    softcap,
    SPAN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_H: tl.constexpr,
    EVEN_V: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    part, row, high, total, slope, second = score_block(
        x_ptr,
        x_stride,
        x_column,
        w_ptr,
        w_stride,
        bias_ptr,
        row_scale_ptr,
        column_scale_ptr,
        N,
        V,
        H,
        parts,
        scale,
        softcap,
        SPAN,
        HAS_BIAS,
        HAS_SCALES,
        SOFTCAP,
        DESCRIPTORS,
        EVEN_H,
        EVEN_V,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        GROUP,
    )
    row_ok = row < N
    out = out_ptr + part.to(tl.int64) * N + row
    stat = parts.to(tl.int64) * N
    tl.store(out, high, mask=row_ok)
    tl.store(out + stat, total, mask=row_ok)
    tl.store(out + 2 * stat, slope, mask=row_ok)
    tl.store(out + 3 * stat, second, mask=row_ok)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the GPU has products of 8-bit floats: Ada, Hopper or later."""
    return INTERPRETED or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9))


def score_partials_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    span: int,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    **overrides: Any,
) -> Tensor:
    """As the reference. ``overrides`` replace tile sizes and the choice of ``DESCRIPTORS``."""
    (rows, width), vocab = hidden.shape, weight.shape[0]
    if hidden.dtype == torch.float8_e4m3fn and not multiplies_fp8(hidden.device):  # bfloat16 holds every 8-bit float
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    weight = contiguous_rows(weight)
    bias = None if bias is None else bias.contiguous()
    parts = -(-vocab // span)
    out = torch.empty(4, parts, rows, dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return out
    config = {**configurations(hidden.dtype)[0], "DESCRIPTORS": loads_by_tma(hidden, weight), **overrides}
    if span % config["BLOCK_N"]:
        raise ValueError(f"span must be a multiple of {config['BLOCK_N']}, got {span}")
    matrices, constants = operands(hidden, weight, config)
    _score_kernel[(-(-rows // config["BLOCK_M"]) * parts,)](
        *(*matrices, bias, row_scale, column_scale, out, rows, vocab, width, parts, scale, softcap),
        SPAN=span,
        HAS_BIAS=bias is not None,
        HAS_SCALES=row_scale is not None,
        SOFTCAP=softcap != 0.0,
        EVEN_V=vocab % config["BLOCK_N"] == 0,
        **constants,
        **config,
    )
    return out
