"""Triton kernels of ``cggr::linear_cross_entropy``: from the parts of ``score_partials`` to the loss, and the
gradient of a span of logits without the logits.

The specification is ``cggr_compile.ops.linear_cross_entropy``. The second kernel makes the product of the scoring
kernel (``head_product``) with another end: each tile of logits becomes its gradient in registers and is written once.
It has not been timed on a GPU.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cggr_compile.kernels.common import LN2, LOG2E, grouped_tile
from cggr_compile.kernels.head_product import add_product, configurations, loads_by_tma, next_step, operands, row_starts


@triton.jit
def _squash(products, scale, softcap, SOFTCAP: tl.constexpr):
    """The logits of the head's products, and the derivative of the one by the other over ``scale``."""
    z = products * scale
    slope = tl.full(z.shape, 1.0, tl.float32)
    if SOFTCAP:
        # tanh(y) = 1 - 2 / (exp(2 y) + 1)
        bent = 1.0 - 2.0 / (tl.exp2(z * (2.0 * LOG2E / softcap)) + 1.0)
        z = bent * softcap
        slope = 1.0 - bent * bent
    return z, slope


# a count that happens to be 1 would otherwise be a constant, and no tensor
@triton.jit(do_not_specialize=["N", "V", "parts"])
def _loss_kernel(
    partials_ptr,
    x_ptr,
    x_stride,
    x_column,
    w_ptr,
    w_stride,
    w_column,
    bias_ptr,
    labels_ptr,
    mean_ptr,
    loss_ptr,
    lse_ptr,
    N,
    V,
    H,
    parts,
    scale,
    softcap,
    smoothing,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = row < N
    safe_row = tl.minimum(row, N - 1).to(tl.int64)
    stat = parts.to(tl.int64) * N
    # one pass over the parts: sums are relative to each part's own maximum
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    at = partials_ptr + safe_row
    for _ in range(parts):
        part_high = tl.load(at)
        part_total = tl.load(at + stat)
        top = tl.maximum(high, part_high)
        total = total * tl.exp2((high - top) * LOG2E) + part_total * tl.exp2((part_high - top) * LOG2E)
        high = top
        at += N
    lse = high + tl.log2(total) * LN2

    label = tl.load(labels_ptr + safe_row).to(tl.int64)
    known = (label >= 0) & (label < V)
    label = tl.where(known, label, 0)
    product = tl.zeros([BLOCK_M], tl.float32)
    for step in range(tl.cdiv(H, BLOCK_K)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (k < H)[None, :]
        x = tl.load(x_ptr + safe_row[:, None] * x_stride + k[None, :] * x_column, mask=inside, other=0.0)
        w = tl.load(w_ptr + label[:, None] * w_stride + k[None, :] * w_column, mask=inside, other=0.0)
        product += tl.sum(x.to(tl.float32) * w.to(tl.float32), 1)
    if HAS_BIAS:
        product += tl.load(bias_ptr + label).to(tl.float32)
    aim, _ = _squash(product, scale, softcap, SOFTCAP)
    if SMOOTH:
        aim += smoothing * (tl.load(mean_ptr + safe_row) - aim)
    tl.store(loss_ptr + row, tl.where(known, lse - aim, 0.0), mask=ok)
    tl.store(lse_ptr + row, lse, mask=ok)


@triton.jit(do_not_specialize=["N", "C", "parts", "first"])
def _logit_gradient_kernel(
    x_ptr,
    x_stride,
    x_column,
    w_ptr,
    w_stride,
    bias_ptr,
    labels_ptr,
    lse_ptr,
    on_p_ptr,
    on_t_ptr,
    out_ptr,
    out_stride,
    N,
    C,
    H,
    parts,
    first,
    scale,
    softcap,
    at_label,
    everywhere,
    SPAN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    block, part = grouped_tile(tl.program_id(0), tl.cdiv(N, BLOCK_M), parts, GROUP)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < N
    safe_row = tl.minimum(row, N - 1).to(tl.int64)
    lse = tl.load(lse_ptr + safe_row)
    on_p = tl.load(on_p_ptr + safe_row)
    on_t = tl.load(on_t_ptr + safe_row)
    label = tl.load(labels_ptr + safe_row).to(tl.int64) - first  # among these columns

    x_rows = row_starts(x_ptr, x_stride, safe_row[:, None], DESCRIPTORS)  # rows past the end read the last one
    steps = tl.cdiv(H, BLOCK_K)
    start = part * SPAN
    tiles = tl.cdiv(tl.minimum(SPAN, C - start), BLOCK_N)
    out_tile = out_ptr + safe_row[:, None] * out_stride

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    low = start - BLOCK_N
    step = -1
    for _ in range(tiles * steps):
        step, low = next_step(step, low, steps, BLOCK_N)
        acc = add_product(
            acc, x_rows, x_column, w_ptr, w_stride, block * BLOCK_M, low, step, C, H,
            DESCRIPTORS, EVEN_H, PRECISION, BLOCK_N, BLOCK_K
        )  # fmt: skip
        if step == steps - 1:
            column = low + tl.arange(0, BLOCK_N)
            products = acc
            if HAS_BIAS:
                products += tl.load(bias_ptr + tl.minimum(column, C - 1)).to(tl.float32)[None, :]
            z, slope = _squash(products, scale, softcap, SOFTCAP)
            p = tl.exp2((z - lse[:, None]) * LOG2E)
            t = tl.where(label[:, None] == column[None, :], at_label + everywhere, everywhere)
            gradient = (p * on_p[:, None] - t * on_t[:, None]) * slope * scale
            out_at = out_tile + column[None, :]
            tl.store(out_at, gradient.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & (column < C)[None, :])
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)


def gradient_configuration(dtype: torch.dtype, descriptors: bool) -> dict[str, int]:
    """Tile sizes: those of the scoring kernel; with pointers in place of descriptors these spill registers."""
    config = configurations(dtype)[0]
    return config if descriptors else {**config, "BLOCK_N": min(config["BLOCK_N"], 128)}


def loss_triton(
    partials: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    mean: Tensor | None,
    scale: float,
    softcap: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Loss and logsumexp, float32 [N], from ``partials`` [4, parts, N] of ``score_partials``.

    ``mean``: float32 [N], the mean logit of each row; needed where ``label_smoothing`` is not 0.
    """
    (rows, width), vocab = hidden.shape, weight.shape[0]
    loss, lse = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(2))
    block = 16
    if rows:
        _loss_kernel[(-(-rows // block),)](
            *(partials, hidden, hidden.stride(0), hidden.stride(1), weight, weight.stride(0), weight.stride(1), bias),
            *(labels.contiguous(), mean, loss, lse, rows, vocab, width, partials.shape[1]),
            *(scale, softcap, label_smoothing),
            HAS_BIAS=bias is not None,
            SOFTCAP=softcap != 0.0,
            SMOOTH=mean is not None,
            BLOCK_M=block,
            BLOCK_K=128,
            num_warps=4,
        )
    return loss, lse


def logit_gradient_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logsumexp: Tensor,
    on_p: Tensor,
    on_t: Tensor,
    scale: float,
    softcap: float,
    label_smoothing: float,
    part: slice,
    into: Tensor,
    **overrides: Any,
) -> None:
    """Writes the gradient of the head's products for the columns ``part`` of the vocabulary.

    Args:
        hidden, weight, bias, labels, logsumexp: as in the operator; the columns of ``weight`` are contiguous.
        on_p, on_t: float32 [N], what a row's probabilities and its targets count.
        into: [N, part.stop - part.start], any float dtype, contiguous columns.
        overrides: replace entries of ``gradient_configuration``, the choice of ``DESCRIPTORS``, and ``SPAN``, the
            columns that one program walks over.
    """
    (rows, width), vocab = hidden.shape, weight.shape[0]
    if rows == 0:
        return
    weight, columns = weight[part], part.stop - part.start
    config = {"DESCRIPTORS": loads_by_tma(hidden, weight), "SPAN": 1024, **overrides}
    config = {**gradient_configuration(hidden.dtype, config["DESCRIPTORS"]), **config}
    matrices, constants = operands(hidden, weight, config)
    parts = -(-columns // config["SPAN"])
    _logit_gradient_kernel[(-(-rows // config["BLOCK_M"]) * parts,)](
        *(*matrices, None if bias is None else bias[part]),
        *(labels.contiguous(), logsumexp.contiguous(), on_p.contiguous(), on_t.contiguous(), into, into.stride(0)),
        *(rows, columns, width, parts, part.start, scale, softcap, 1.0 - label_smoothing, label_smoothing / vocab),
        HAS_BIAS=bias is not None,
        SOFTCAP=softcap != 0.0,
        **constants,
        **config,
    )
