"""Triton kernels of ``cggr::head_gradients``: the gradient of a span of logits without the logits, and its products
with as many rows as the device says.

The specification is ``cggr_compile.ops.head_gradients``. The kernel makes the product of the scoring kernel
(``head_product``) with another end: each tile of logits becomes its gradient in registers and is written once.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cggr_compile.kernels.common import LOG2E, grouped_tile, has_descriptors
from cggr_compile.kernels.head_product import (
    add_product,
    configurations,
    loads_by_tma,
    next_step,
    operands,
    row_starts,
    squash,
)
from cggr_compile.kernels.moe_products import library_takes, multiply_rows
from cggr_compile.kernels.moe_weight_gradient import weight_gradient


# a count that happens to be 1 would otherwise be a constant, and no tensor
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
    on_log_p_ptr,
    on_p2_ptr,
    on_label_ptr,
    everywhere_ptr,
    count_ptr,
    out_ptr,
    out_stride,
    N,
    C,
    H,
    parts,
    first,
    scale,
    softcap,
    SPAN: tl.constexpr,
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
    safe_row = tl.minimum(row, N - 1).to(tl.int64)
    lse = tl.load(lse_ptr + safe_row)[:, None]
    on_p = tl.load(on_p_ptr + safe_row)[:, None]
    on_label = tl.load(on_label_ptr + safe_row)[:, None]
    label = tl.load(labels_ptr + safe_row).to(tl.int64) - first  # among these columns

    x_rows = row_starts(x_ptr, x_stride, safe_row[:, None], DESCRIPTORS)  # rows past the end read the last one
    steps = tl.cdiv(H, BLOCK_K)
    start = part * SPAN
    tiles = tl.cdiv(tl.minimum(SPAN, C - start), BLOCK_N)
    out_tile = out_ptr + safe_row[:, None] * out_stride
    rows = N
    if count_ptr is not None:
        rows = tl.load(count_ptr)
        tiles = tl.where(block * BLOCK_M < rows, tiles, 0)
    row_ok = row < rows

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
            if bias_ptr is not None:
                products += tl.load(bias_ptr + tl.minimum(column, C - 1)).to(tl.float32)[None, :]
            z, slope = squash(products, scale, softcap, SOFTCAP)
            log_p = z - lse
            p = tl.exp2(log_p * LOG2E)
            factor = on_p
            if on_log_p_ptr is not None:
                factor += tl.load(on_log_p_ptr + safe_row)[:, None] * log_p
            if on_p2_ptr is not None:
                factor += tl.load(on_p2_ptr + safe_row)[:, None] * p
            gradient = p * factor + tl.where(label[:, None] == column[None, :], on_label, 0.0)
            if everywhere_ptr is not None:
                gradient += tl.load(everywhere_ptr + safe_row)[:, None]
            gradient *= slope * scale
            out_at = out_tile + column[None, :]
            tl.store(out_at, gradient.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & (column < C)[None, :])
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)


def gradient_configuration(dtype: torch.dtype, descriptors: bool) -> dict[str, int]:
    """Tile sizes: those of the scoring kernel; with pointers in place of descriptors these spill registers."""
    config = configurations(dtype)[0]
    return config if descriptors else {**config, "BLOCK_N": min(config["BLOCK_N"], 128)}


def logit_gradient_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logsumexp: Tensor,
    factors: Sequence[Tensor | None],
    scale: float,
    softcap: float,
    count: Tensor | None,
    part: slice,
    into: Tensor,
    **overrides: Any,
) -> None:
    """Writes the gradient of the head's products for the columns ``part`` of the vocabulary.

    Args:
        hidden ... logsumexp, scale, softcap: as in the operator; the columns of ``weight`` are contiguous.
        factors: on_p, on_log_p, on_p2, on_label, everywhere, as there.
        count: int32 [1], of how many rows, the first ones; programs of later rows do nothing. None: of all.
        into: [N, part.stop - part.start], any float dtype, contiguous columns.
        overrides: replace entries of ``gradient_configuration``, the choice of ``DESCRIPTORS``, and ``SPAN``, the
            columns that one program walks over.
    """
    rows, width = hidden.shape
    if rows == 0:
        return
    weight, columns = weight[part], part.stop - part.start
    config = {"DESCRIPTORS": loads_by_tma(hidden, weight), "SPAN": 1024, **overrides}
    config = {**gradient_configuration(hidden.dtype, config["DESCRIPTORS"]), **config}
    matrices, constants = operands(hidden, weight, config)
    parts = -(-columns // config["SPAN"])
    numbers = (labels, logsumexp, *factors)
    _logit_gradient_kernel[(-(-rows // config["BLOCK_M"]) * parts,)](
        *(*matrices, None if bias is None else bias[part].contiguous()),
        *(None if number is None else number.contiguous() for number in numbers),
        *(count, into, into.stride(0), rows, columns, width, parts, part.start, scale, softcap),
        SOFTCAP=softcap != 0.0,
        **constants,
        **config,
    )


class FirstRowsProducts:
    """The products that a gradient of logits is multiplied out by, over its first ``count`` rows: int32 [1].

    To the grouped products they are the rows of a single expert.
    """

    every_row = False

    def __init__(self, count: Tensor, **overrides: Any) -> None:
        """``overrides``: tile sizes."""
        self.offsets = torch.nn.functional.pad(count, (1, 0))
        self.queues: dict[int, Tensor] = {}
        self.overrides = overrides

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """``total += left @ right`` in those rows; ``total``: float32."""
        if total.shape[0]:
            multiply_rows("add", left, right[None], total, self.offsets, queues=self.queues, **self.overrides)

    def outer(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """``out = left.t() @ right``, summed over those rows."""
        if library_takes_rows(left, right):
            found = F.grouped_mm(left.t(), right, offs=self.offsets[1:])
        else:
            found = weight_gradient("d_gate_up", left, right, None, self.offsets, 1, gathered=True, **self.overrides)
        out.copy_(found[0])


def library_takes_rows(left: Tensor, right: Tensor) -> bool:
    """Whether ``F.grouped_mm`` sums their outer products over rows that the device counts."""
    takes = left.is_cuda and library_takes(left.device, left.dtype)
    return takes and all(has_descriptors(t) and t.shape[1] % 8 == 0 for t in (left, right))
