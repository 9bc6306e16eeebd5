"""The product of rows with a head's weight, ``x @ w.T``, as the kernels that fold its tiles make it.

Measured on an H100: one loop over (tile, step along H), so that the loads of the next tile are under way while a tile
is folded, and tensor descriptors (TMA) together bring 65 % of the speed of the plain product to 92 %.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cggr_compile.kernels.common import LOG2E, for_interpreter, has_descriptors, on_tensor_cores, precision


@triton.jit
def row_starts(x_ptr, x_stride, row, DESCRIPTORS: tl.constexpr):
    """For ``add_product``: where ``row`` [BLOCK_M, 1] starts; with DESCRIPTORS, ``x_ptr`` is one and knows."""
    starts = x_ptr
    if not DESCRIPTORS:
        starts = x_ptr + row * x_stride
    return starts


@triton.jit
def next_step(step, low, steps, BLOCK_N: tl.constexpr):
    """Of one loop over (tile, step along H): the step that follows, and the first column of its tile.

    Before the first step: -1, and a column BLOCK_N before the first tile's.
    """
    step = tl.where(step == steps - 1, 0, step + 1)
    return step, tl.where(step == 0, low + BLOCK_N, low)


@triton.jit
def add_product(
    acc,
    x_rows,
    x_column,
    w_ptr,
    w_stride,
    first_row,
    low,
    step,
    V,
    H,
    DESCRIPTORS: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``acc`` [BLOCK_M, BLOCK_N] plus one step of ``x @ w.T``: rows from ``first_row``, columns from ``low``.

    ``x_rows``: of ``row_starts``. ``w`` is [V, H]; columns past V read the last one.
    """
    if DESCRIPTORS:
        x = x_rows.load([first_row, step * BLOCK_K])
        w = w_ptr.load([low, step * BLOCK_K])
    else:
        column = tl.minimum(low + tl.arange(0, BLOCK_N), V - 1)
        along = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x_at = x_rows + along[None, :] * x_column
        w_at = w_ptr + column.to(tl.int64)[:, None] * w_stride + along[None, :]
        if EVEN_H:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(along < H)[None, :], other=0.0)
            w = tl.load(w_at, mask=(along < H)[None, :], other=0.0)
    return tl.dot(x, w.T, acc, input_precision=PRECISION)


@triton.jit
def squash(products, scale, softcap, SOFTCAP: tl.constexpr):
    """The logits of the head's products, and the derivative of the one by the other over ``scale``."""
    z = products * scale
    slope = tl.full(z.shape, 1.0, tl.float32)
    if SOFTCAP:
        # tanh(y) = 1 - 2 / (exp(2 y) + 1)
        bent = 1.0 - 2.0 / (tl.exp2(z * (2.0 * LOG2E / softcap)) + 1.0)
        z = bent * softcap
        slope = 1.0 - bent * bent
    return z, slope


def loads_by_tma(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the tiles of a product should be loaded by TMA: it can, and it pays."""
    return on_tensor_cores(hidden.dtype) and has_descriptors(hidden) and has_descriptors(weight)


# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) for 16-bit dtypes: the first measured on an H100, the others for an
# autotuner to try. Compiled for sm_80 or sm_100, 128 x 256 spills registers; 128 x 128 with 8 warps does not.
TILES = (
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 3),
    (64, 256, 64, 4, 4),
    (128, 128, 32, 4, 4),
    (64, 128, 64, 4, 3),
)
# float32 multiplies in twice the registers
WIDE_TILES = ((64, 128, 32, 4, 3), (128, 128, 32, 8, 3), (64, 64, 32, 4, 3), (64, 64, 32, 4, 4))


def configurations(dtype: torch.dtype) -> list[dict[str, int]]:
    """Tile sizes worth trying; the first is the one that is used where nothing is tried."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    tiles = [dict(zip(names, sizes, strict=True)) for sizes in (WIDE_TILES if dtype.itemsize == 4 else TILES)]
    if dtype.itemsize == 1:  # the same bytes as in 16 bits; not tuned
        tiles = [{**sizes, "BLOCK_K": 2 * sizes["BLOCK_K"]} for sizes in tiles]
    return [{**sizes, "GROUP": 16} for sizes in tiles]


def operands(hidden: Tensor, weight: Tensor, config: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first arguments of a kernel that makes this product, and the constants they decide.

    ``weight``: its columns are contiguous. ``config``: tile sizes and ``DESCRIPTORS``.
    """
    hidden, weight = for_interpreter(hidden), for_interpreter(weight)
    x: Any = hidden
    w: Any = weight
    if config["DESCRIPTORS"]:
        x = TensorDescriptor.from_tensor(hidden, [config["BLOCK_M"], config["BLOCK_K"]])
        w = TensorDescriptor.from_tensor(weight, [config["BLOCK_N"], config["BLOCK_K"]])
    constants = {"EVEN_H": hidden.shape[1] % config["BLOCK_K"] == 0, "PRECISION": precision(hidden.dtype)}
    return (x, hidden.stride(0), hidden.stride(1), w, weight.stride(0)), constants
