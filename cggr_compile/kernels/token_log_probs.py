"""Triton kernels of ``cggr::token_log_probs``: one pass over the vocabulary, online reductions, no logits in memory.

The specification is ``cggr_compile.ops.token_log_probs``. As in ``score``, a program owns a block of rows and one span
of the vocabulary, and folds each tile of logits into running numbers per row (online softmax, Milakov and Gimelshein,
arXiv 1805.02867); the label's logit is picked as its tile passes. A second kernel puts the spans together.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cggr_compile.kernels.common import LN2, LOG2E, contiguous_rows, grouped_tile
from cggr_compile.kernels.head_product import (
    add_product,
    configurations,
    loads_by_tma,
    next_step,
    operands,
    row_starts,
    squash,
)

SPAN = 2048  # columns of the vocabulary that one program walks over
# Logit of a column past the end. Not -inf, whose product with its probability, zero, would be NaN.
NOWHERE = tl.constexpr(-1e30)


# a count that happens to be 1 would otherwise be a constant, and no tensor
@triton.jit(do_not_specialize=["N", "V", "parts"])
def _partials_kernel(
    x_ptr,
    x_stride,
    x_column,
    w_ptr,
    w_stride,
    bias_ptr,
    labels_ptr,
    count_ptr,
    out_ptr,
    N,
    V,
    H,
    parts,
    scale,
    softcap,
    SPAN: tl.constexpr,
    SQUARES: tl.constexpr,
    MEAN: tl.constexpr,
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
    """For each part and row: maximum m; sums of exp(z - m) and exp(z - m) (z - m); the label's z if it is here; then
    sums of exp(2 z - 2 m) and z, where they are wanted."""
    block, part = grouped_tile(tl.program_id(0), tl.cdiv(N, BLOCK_M), parts, GROUP)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_row = tl.minimum(row, N - 1).to(tl.int64)
    label = tl.load(labels_ptr + safe_row).to(tl.int32)
    x_rows = row_starts(x_ptr, x_stride, safe_row[:, None], DESCRIPTORS)  # rows past the end read the last one
    steps = tl.cdiv(H, BLOCK_K)
    start = part * SPAN
    tiles = tl.cdiv(tl.minimum(SPAN, V - start), BLOCK_N)
    rows = N
    if count_ptr is not None:
        rows = tl.load(count_ptr)
        tiles = tl.where(block * BLOCK_M < rows, tiles, 0)

    high = tl.full([BLOCK_M], NOWHERE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    slope = total
    picked = total
    squares = total
    linear = total
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
            column = low + tl.arange(0, BLOCK_N)
            z = acc
            if bias_ptr is not None:
                z += tl.load(bias_ptr + tl.minimum(column, V - 1)).to(tl.float32)[None, :]
            z, _slope = squash(z, scale * LOG2E, softcap * LOG2E, SOFTCAP)  # in powers of two
            inside = (column < V)[None, :]
            if MEAN:
                linear += tl.sum(z if EVEN_V else tl.where(inside, z, 0.0), 1)
            if not EVEN_V:
                z = tl.where(inside, z, NOWHERE)
            # few tiles have a label; looked for in every one of them, it would spill registers
            if tl.max(tl.where((label >= low) & (label < low + BLOCK_N), 1, 0), 0) > 0:
                picked += tl.sum(tl.where(label[:, None] == column[None, :], z, 0.0), 1)
            new_high = tl.maximum(high, tl.max(z, 1))
            p = tl.exp2(z - new_high[:, None])
            factor = tl.exp2(high - new_high)
            slope = factor * slope + tl.sum(p * z, 1)
            total = factor * total + tl.sum(p, 1)
            if SQUARES:
                squares = factor * factor * squares + tl.sum(p * p, 1)
            high = new_high
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    row_ok = row < rows
    stat = parts.to(tl.int64) * N
    out = out_ptr + part.to(tl.int64) * N + row
    tl.store(out, high * LN2, mask=row_ok)
    tl.store(out + stat, total, mask=row_ok)
    tl.store(out + 2 * stat, (slope - high * total) * LN2, mask=row_ok)
    tl.store(out + 3 * stat, picked * LN2, mask=row_ok)
    if SQUARES:
        tl.store(out + 4 * stat, squares, mask=row_ok)
    if MEAN:
        tl.store(out + (4 + SQUARES) * stat, linear * LN2, mask=row_ok)


@triton.jit(do_not_specialize=["N", "V", "parts"])
def _merge_kernel(
    partials_ptr,
    labels_ptr,
    order_ptr,
    count_ptr,
    log_prob_ptr,
    entropy_ptr,
    lse_ptr,
    log_squares_ptr,
    mean_ptr,
    hit_ptr,
    N,
    V,
    parts,
    SQUARES: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = row < N
    label = tl.load(labels_ptr + row, mask=ok, other=-1).to(tl.int64)
    known = (label >= 0) & (label < V)
    to = row
    if order_ptr is not None:
        to = tl.load(order_ptr + row, mask=ok, other=0)
        # what lies past the count was never written
        known = known & (row < tl.load(count_ptr))
    stat = parts.to(tl.int64) * N
    high = tl.full([BLOCK], NOWHERE, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    slope = total
    picked = total
    squares = total
    linear = total
    at = partials_ptr + row
    for _ in range(parts):
        part_high = tl.load(at, mask=known, other=0.0)
        part_total = tl.load(at + stat, mask=known, other=1.0)
        top = tl.maximum(high, part_high)
        old = tl.exp2((high - top) * LOG2E)
        new = tl.exp2((part_high - top) * LOG2E)
        part_slope = tl.load(at + 2 * stat, mask=known, other=0.0) + (part_high - top) * part_total
        slope = old * (slope + (high - top) * total) + new * part_slope
        total = old * total + new * part_total
        picked += tl.load(at + 3 * stat, mask=known, other=0.0)
        if SQUARES:
            part_squares = tl.load(at + 4 * stat, mask=known, other=1.0)
            squares = old * old * squares + new * new * part_squares
        if MEAN:
            linear += tl.load(at + (4 + SQUARES) * stat, mask=known, other=0.0)
        high = top
        at += N
    log_total = tl.log2(total) * LN2
    tl.store(log_prob_ptr + to, tl.where(known, picked - high - log_total, 0.0), mask=ok)
    tl.store(entropy_ptr + to, tl.where(known, log_total - slope / total, 0.0), mask=ok)
    tl.store(lse_ptr + to, tl.where(known, high + log_total, 0.0), mask=ok)
    tl.store(hit_ptr + to, tl.where(known & (picked >= high), 1.0, 0.0), mask=ok)
    if SQUARES:
        tl.store(log_squares_ptr + to, tl.where(known, tl.log2(squares) * LN2 - 2.0 * log_total, 0.0), mask=ok)
    if MEAN:
        tl.store(mean_ptr + to, tl.where(known, linear / V, 0.0), mask=ok)


def token_log_probs_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    packing: tuple[Tensor, Tensor] | None,
    scale: float,
    softcap: float,
    squares: bool,
    mean: bool,
    into: Sequence[Tensor],
    **overrides: Any,
) -> None:
    """Writes the operator's values of rows [N, H], contiguous [N] each, in its order.

    Args:
        packing: the order of rows that puts those with a label first, int64 [N], and their number, int32 [1]; None:
            no row is left out.
        overrides: replace tile sizes, the choice of ``DESCRIPTORS``, and ``SPAN``.
    """
    (rows, width), vocab = hidden.shape, weight.shape[0]
    if rows == 0:
        return
    order, count = packing or (None, None)
    if order is not None:
        hidden, labels = hidden[order], labels[order]
    weight, labels = contiguous_rows(weight), labels.contiguous()
    config = {**configurations(hidden.dtype)[0], "DESCRIPTORS": loads_by_tma(hidden, weight), "SPAN": SPAN, **overrides}
    matrices, constants = operands(hidden, weight, config)
    parts = -(-vocab // config["SPAN"])
    partials = hidden.new_empty(4 + squares + mean, parts, rows, dtype=torch.float32)
    _partials_kernel[(-(-rows // config["BLOCK_M"]) * parts,)](
        *(*matrices, None if bias is None else bias.contiguous(), labels, count, partials),
        *(rows, vocab, width, parts, scale, softcap),
        SQUARES=squares,
        MEAN=mean,
        SOFTCAP=softcap != 0.0,
        EVEN_V=vocab % config["BLOCK_N"] == 0,
        **constants,
        **config,
    )
    block = 32
    _merge_kernel[(-(-rows // block),)](
        *(partials, labels, order, count, *into, rows, vocab, parts),
        SQUARES=squares,
        MEAN=mean,
        BLOCK=block,
        num_warps=1,
    )
