"""Triton kernel of ``cggr::score_partials``: one pass over the vocabulary, online reductions, no logits in memory.

The specification is ``cggr_compile.ops.score.score_partials_reference``. A program owns a block of rows and one span
of the vocabulary: it multiplies tile after tile of the head's weight and folds each into four running numbers per row
(online softmax, Milakov and Gimelshein, arXiv 1805.02867, with the second maximum and the entropy's sum beside it).

Measured on an H100: one loop over (tile, step along H), so that the loads of the next tile are under way while a tile
is folded, and tensor descriptors (TMA) together bring 65 % of the speed of the plain product to 92 %.

``score_block`` is the body of two kernels: the one here, and Inductor's template of ``lowerings/score.py``.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cggr_compile.compat import multiplies_in_tf32
from cggr_compile.ops.score import FP8

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
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
    # neighbours in time share tiles of both operands: GROUP row blocks walk over the same span
    program = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_M)
    first = program // (GROUP * parts) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    inside = program % (GROUP * parts)
    block = first + inside % size
    part = inside // size

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(H, BLOCK_K)
    start = part * SPAN
    tiles = tl.cdiv(tl.minimum(SPAN, V - start), BLOCK_N)
    if not DESCRIPTORS:  # rows and columns past the end read the last one
        x_tile = x_ptr + tl.minimum(row, N - 1).to(tl.int64)[:, None] * x_stride

    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    second = high
    total = tl.zeros([BLOCK_M], tl.float32)
    slope = total
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    low = start - BLOCK_N
    step = -1
    for _ in range(tiles * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        low = tl.where(step == 0, low + BLOCK_N, low)
        if DESCRIPTORS:
            x = x_ptr.load([block * BLOCK_M, step * BLOCK_K])
            w = w_ptr.load([low, step * BLOCK_K])
        else:
            column = tl.minimum(low + tl.arange(0, BLOCK_N), V - 1)
            along = step * BLOCK_K + k
            x_at = x_tile + along[None, :] * x_column
            w_at = w_ptr + column.to(tl.int64)[:, None] * w_stride + along[None, :]
            if EVEN_H:
                x = tl.load(x_at)
                w = tl.load(w_at)
            else:
                x = tl.load(x_at, mask=(along < H)[None, :], other=0.0)
                w = tl.load(w_at, mask=(along < H)[None, :], other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
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


INTERPRETED = not isinstance(_score_kernel, triton.runtime.JITFunction)


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


def configuration(dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes: measured on an H100 for 16-bit dtypes."""
    return configurations(dtype)[0]


def has_descriptors(tensor: Tensor) -> bool:
    """Whether TMA can load tiles of this tensor."""
    return tensor.is_cuda and tma_loads(tensor.device, tensor.stride(), tensor.element_size(), tensor.data_ptr())


def tma_loads(device: torch.device, strides: Sequence[int], width: int, address: int) -> bool:
    """Whether TMA can load tiles: Hopper or later, contiguous rows, all other strides multiples of 16 bytes.

    ``width``: bytes of an element. ``address``: of the first one, up to multiples of 16 bytes.
    """
    aligned = address % 16 == 0 and all(stride * width % 16 == 0 for stride in strides[:-1])
    return aligned and strides[-1] == 1 and torch.cuda.get_device_capability(device)[0] >= 9


def operands(hidden: Tensor, weight: Tensor, config: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first arguments of a kernel that multiplies rows by a head's weight, and the constants they decide.

    ``weight``: its columns are contiguous. ``config``: tile sizes and ``DESCRIPTORS``.
    """
    if INTERPRETED and hidden.dtype in (torch.bfloat16, FP8):  # whose products of those are wrong
        hidden, weight = hidden.float(), weight.float()
    x: Any = hidden
    w: Any = weight
    if config["DESCRIPTORS"]:
        x = TensorDescriptor.from_tensor(hidden, [config["BLOCK_M"], config["BLOCK_K"]])
        w = TensorDescriptor.from_tensor(weight, [config["BLOCK_N"], config["BLOCK_K"]])
    constants = {"EVEN_H": hidden.shape[1] % config["BLOCK_K"] == 0, "PRECISION": precision(hidden.dtype)}
    return (x, hidden.stride(0), hidden.stride(1), w, weight.stride(0)), constants


def precision(dtype: torch.dtype) -> str:
    """Of products, as PyTorch's settings have it."""
    return "tf32" if dtype == torch.float32 and multiplies_in_tf32() else "ieee"


def on_tensor_cores(dtype: torch.dtype) -> bool:
    """Whether products use them. Without, tiles loaded by TMA spill registers (compiled for sm_90 and sm_100)."""
    return dtype != torch.float32 or precision(dtype) == "tf32"


def loads_by_tma(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the tiles of a product should be loaded by TMA: it can, and it pays."""
    return on_tensor_cores(hidden.dtype) and has_descriptors(hidden) and has_descriptors(weight)


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
    """As the reference. ``overrides`` replace entries of :func:`configuration` and the choice of ``DESCRIPTORS``."""
    (rows, width), vocab = hidden.shape, weight.shape[0]
    if hidden.dtype == FP8 and not multiplies_fp8(hidden.device):  # bfloat16 holds every 8-bit float
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    parts = -(-vocab // span)
    out = torch.empty(4, parts, rows, dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return out
    config = {
        **configuration(hidden.dtype),
        "DESCRIPTORS": loads_by_tma(hidden, weight),
        **overrides,
    }
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
