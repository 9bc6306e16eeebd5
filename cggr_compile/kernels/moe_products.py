"""Triton kernels for grouped matrix products: rows sorted by expert, a matrix per expert.

The kernel is persistent: one program per multiprocessor walks over a queue of tiles that spans all experts, so that an
expert with few rows leaves nobody idle. Rows may be gathered as they are loaded (a row of the order names a token), and
SwiGLU, or its derivative, is applied to the product before it is stored.

An expert's matrix is read through tensor descriptors (TMA) on Hopper and later, and so are rows that are not gathered.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cggr_compile.kernels import moe_tiles
from cggr_compile.kernels.common import contiguous_rows, for_interpreter, grouped_tile, has_descriptors, precision
from cggr_compile.kernels.moe_gather import gather_rows
from cggr_compile.kernels.moe_swiglu import back_through_swiglu, halves, store_tile, through_swiglu
from cggr_compile.kernels.ragged import ragged

GATHERED = ("inner", "swiglu", "swiglu_backward", "d_activation")  # kernels that are given a row for every token

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}
PLAIN, SWIGLU, SWIGLU_BACKWARD, ADD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _schedule_kernel(offsets_ptr, schedule_ptr, E, LANES: tl.constexpr, BLOCK_M: tl.constexpr):
    expert = tl.program_id(0)
    lane = tl.arange(0, LANES)
    start = tl.load(offsets_ptr + lane, mask=lane < E, other=0)
    end = tl.load(offsets_ptr + lane + 1, mask=lane < E, other=0)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    if expert == 0:
        tl.store(schedule_ptr, tl.sum(tiles, 0))
    earlier = tl.sum(tl.where(lane < expert, tiles, 0), 0)
    mine = tl.sum(tl.where(lane == expert, tiles, 0), 0)
    first_row = tl.load(offsets_ptr + expert)
    for low in range(0, mine, 128):
        tile = low + tl.arange(0, 128)
        entry = schedule_ptr + 1 + 2 * (earlier + tile)
        tl.store(entry, tl.zeros([128], tl.int32) + expert, mask=tile < mine)
        tl.store(entry + 1, first_row + tile * BLOCK_M, mask=tile < mine)


@triton.jit
def _expert_tile(
    b_ptr, b_expert, b_row, expert, low, step, N, K,
    DESCRIPTOR: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, BLOCK_N] of an expert's matrix, columns from ``low``; stored [N, K] if TRANSPOSED, else [K, N]."""
    if DESCRIPTOR:
        if TRANSPOSED:
            tile = b_ptr.load([expert, low, step * BLOCK_K]).reshape(BLOCK_N, BLOCK_K).T
        else:
            tile = b_ptr.load([expert, step * BLOCK_K, low]).reshape(BLOCK_K, BLOCK_N)
    else:
        column = low + tl.arange(0, BLOCK_N)
        along = step * BLOCK_K + tl.arange(0, BLOCK_K)
        base = b_ptr + expert.to(tl.int64) * b_expert
        if TRANSPOSED:
            at = base + along[:, None] + column.to(tl.int64)[None, :] * b_row
        else:
            at = base + along.to(tl.int64)[:, None] * b_row + column[None, :]
        inside = None if EVEN else (along < K)[:, None] & (column < N)[None, :]
        tile = tl.load(at, mask=inside, other=None if EVEN else 0.0)
    return tile


@triton.jit
def rows_tile(
    tile, row_tiles, a_ptr, a_stride, b_ptr, b_expert, b_row, order_ptr, offsets_ptr, schedule_ptr, N, K,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, EPILOGUE: tl.constexpr,
    A_DESCRIPTOR: tl.constexpr, B_DESCRIPTOR: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    MERGED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of the queue: its expert, its first row and the expert's last + 1, the number of its columns, its rows
    [BLOCK_M] and columns [BLOCK_N], which of its entries there are, and the product; of SWIGLU those of gate and up,
    which one product of twice the columns computes if MERGED: the descriptor is then of [E, 2, N, K]."""
    column_tiles = tl.cdiv(N, BLOCK_N)
    EVEN: tl.constexpr = EVEN_N and EVEN_K
    row_tile, column_tile = grouped_tile(tile, row_tiles, column_tiles, GROUP)
    expert = tl.load(schedule_ptr + 1 + 2 * row_tile)
    first = tl.load(schedule_ptr + 2 + 2 * row_tile)
    end = tl.load(offsets_ptr + expert + 1)
    low = column_tile * BLOCK_N
    if not A_DESCRIPTOR:  # rows past the expert's end read its last one
        source = tl.minimum(first + tl.arange(0, BLOCK_M), end - 1)
        if GATHER:
            source = tl.load(order_ptr + source) // TOP_K
        a_rows = a_ptr + source.to(tl.int64)[:, None] * a_stride
    acc = tl.zeros([BLOCK_M, 2 * BLOCK_N if MERGED else BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # of SWIGLU; nothing otherwise
    for step in range(tl.cdiv(K, BLOCK_K)):
        if A_DESCRIPTOR:
            a = a_ptr.load([first, step * BLOCK_K])
        else:
            along = step * BLOCK_K + tl.arange(0, BLOCK_K)
            if EVEN_K:
                a = tl.load(a_rows + along[None, :])
            else:
                a = tl.load(a_rows + along[None, :], mask=(along < K)[None, :], other=0.0)
        if MERGED:
            b = b_ptr.load([expert, 0, low, step * BLOCK_K]).reshape(2 * BLOCK_N, BLOCK_K).T
        else:
            b = _expert_tile(
                b_ptr, b_expert, b_row, expert, low, step, N, K, B_DESCRIPTOR, TRANSPOSED, EVEN, BLOCK_N, BLOCK_K
            )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if EPILOGUE == SWIGLU and not MERGED:  # the up rows follow the N rows of the gate
            b = _expert_tile(
                b_ptr, b_expert, b_row, expert, low + N, step, 2 * N, K, B_DESCRIPTOR, TRANSPOSED, EVEN,
                BLOCK_N, BLOCK_K
            )  # fmt: skip
            up = tl.dot(a, b, up, input_precision=PRECISION)
    if MERGED:
        acc, up = halves(acc)
    row = first + tl.arange(0, BLOCK_M)
    column = low + tl.arange(0, BLOCK_N)
    inside = (row < end)[:, None]
    if not EVEN_N:
        inside = inside & (column < N)[None, :]
    return expert, first, end, column_tile, row, column, inside, acc, up


@triton.jit
def _rows_kernel(
    a_ptr, a_stride, b_ptr, b_expert, b_row, bias_ptr, out_ptr, inner_ptr, d_inner_ptr, weights_ptr, d_weights_ptr,
    order_ptr, offsets_ptr, schedule_ptr, rows, N: tl.constexpr, K: tl.constexpr,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, EPILOGUE: tl.constexpr, SAVE: tl.constexpr,
    A_DESCRIPTOR: tl.constexpr, B_DESCRIPTOR: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    MERGED: tl.constexpr, STORES: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.load(schedule_ptr)
    tiles = row_tiles * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        expert, first, end, column_tile, row, column, inside, acc, up = rows_tile(
            tile, row_tiles, a_ptr, a_stride, b_ptr, b_expert, b_row, order_ptr, offsets_ptr, schedule_ptr, N, K,
            TOP_K, GATHER, TRANSPOSED, EPILOGUE, A_DESCRIPTOR, B_DESCRIPTOR, EVEN_N, EVEN_K, MERGED, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP
        )  # fmt: skip
        low = column_tile * BLOCK_N
        if EPILOGUE == PLAIN:
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + expert.to(tl.int64) * N + column, mask=column < N, other=0.0)
                acc += bias.to(tl.float32)[None, :]
            store_tile(out_ptr, acc, first, end, low, row, column, inside, N, DTYPE, STORES)
        elif EPILOGUE == ADD:
            at = row.to(tl.int64)[:, None] * N + column[None, :]
            tl.store(out_ptr + at, acc + tl.load(out_ptr + at, mask=inside, other=0.0), mask=inside)
        elif EPILOGUE == SWIGLU:
            value = through_swiglu(acc, up, first, end, low, row, column, inside, inner_ptr, N, DTYPE, SAVE, STORES)
            store_tile(out_ptr, value, first, end, low, row, column, inside, N, DTYPE, STORES)
        else:
            d_weight = back_through_swiglu(
                acc, column_tile, row, end, order_ptr, weights_ptr, inner_ptr, d_inner_ptr, out_ptr, N,
                EVEN_N, BLOCK_M, BLOCK_N
            )  # fmt: skip
            tl.store(d_weights_ptr + column_tile.to(tl.int64) * rows + row, d_weight, mask=row < end)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(tensor: Tensor) -> int:
    """One per multiprocessor; where there are none (interpreted, or compiled for another machine), a few."""
    return multiprocessors(tensor.device) if tensor.is_cuda else 3


def schedule(offsets: Tensor, rows: int, block: int) -> Tensor:
    """The queue of row tiles: int32 [number, expert, first row, expert, first row, ...], as much as is needed."""
    experts = offsets.shape[0] - 1
    queue = offsets.new_empty(1 + 2 * (rows // block + experts))
    lanes = triton.next_power_of_2(experts)
    _schedule_kernel[(experts,)](offsets, queue, experts, LANES=lanes, BLOCK_M=block)
    return queue


def stored_transposed(matrices: Tensor) -> bool:
    """Whether the last dimension but one is the contiguous one."""
    return matrices.stride(2) != 1 and matrices.stride(1) == 1


def streams(tensor: Tensor) -> bool:
    """Whether TMA is to load tiles of this tensor: of 16 bits. Float32 is multiplied without tensor cores, where tiles
    that come by TMA take five kilobytes of stack a thread."""
    return tensor.element_size() == 2 and has_descriptors(tensor)


def configuration_of(kernel: str, b: Tensor, width: int) -> dict[str, Any]:
    """``moe_tiles.configuration`` of this product, ``width`` columns wide."""
    return moe_tiles.configuration(kernel, b.dtype, width if streams(b) else 0)


def multiply_rows(
    kernel: str,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    offsets: Tensor,
    *,
    queues: dict[int, Tensor],
    bias: Tensor | None = None,
    order: Tensor | None = None,
    top_k: int = 1,
    inner: Tensor | None = None,
    d_inner: Tensor | None = None,
    weights: Tensor | None = None,
    gathered: bool = False,
    **overrides: Any,
) -> Tensor | None:
    """``out[r] = a[r] @ b[e]`` for the rows r of every expert e.

    ================  =============  ============  ==========================================================
    kernel            a              b             out [rows, N]
    ================  =============  ============  ==========================================================
    inner             [tokens, K]    [E, N, K]     the product
    swiglu            [tokens, K]    [E, 2 N, K]   silu(gate) * up; ``inner`` [rows, 2 N] gets gate and up
    down              [rows, K]      [E, N, K]     the product
    swiglu_backward   [tokens, K]    [E, K, N]     the activation times its routing weight; the product is its
                                                   gradient but for that weight, ``d_inner`` gets that of ``inner``
    d_activation      [tokens, K]    [E, K, N]     the product
    d_hidden          [rows, K]      [E, K, N]     the product
    add               [rows, K]      [E, K, N]     what it was, plus the product
    ================  =============  ============  ==========================================================

    Args:
        a: where it is [tokens, K], row r is a[order[r] // top_k].
        b: stored in either order of its last two dimensions. bias: [E, N], added to what is only a product.
        offsets: int32 [E + 1]. order: int32 [rows]; both as ``moe_permute`` returns them.
        inner: None (swiglu only): gate and up are not kept. weights: [tokens * top_k], contiguous.
        queues: schedules by BLOCK_M, for calls with the same offsets to share.
        gathered: ``a`` holds the rows already, [rows, K], where the table has tokens.
        overrides: of ``moe_tiles.configuration``, and of DESCRIPTORS (load by TMA), FLATTEN, PROGRAMS (per
            multiprocessor), GATHER (False: gather the rows of ``a`` in a kernel before, so that they can be loaded by
            TMA).

    Returns:
        of ``swiglu_backward``: float32 [column tiles, rows], parts of the gradient of each row's routing weight.
    """
    gather, transposed = kernel in GATHERED and not gathered, kernel in ("inner", "swiglu", "down")
    if stored_transposed(b):
        b, transposed = b.mT, not transposed
    a, b = contiguous_rows(a), contiguous_rows(b)
    bias = None if bias is None else bias.contiguous()
    rows, width = out.shape
    config = {**configuration_of(kernel, b, width), **overrides}
    if not config.pop("GATHER", True) and gather:
        assert order is not None
        a, gather = gather_rows(a, order, top_k), False
    descriptors = config.pop("DESCRIPTORS", streams(b) and (gather or streams(a)))
    block_m, block_n, block_k = (config[f"BLOCK_{axis}"] for axis in "MNK")
    merged = descriptors and transposed and kernel == "swiglu"  # gate and up are one product
    # one loop over tiles and steps: loads of the next tile start before this one is stored, for more shared memory
    flatten = config.pop("FLATTEN", descriptors) and (merged or kernel != "swiglu")
    stores = flatten and descriptors and width % block_n == 0 and kernel not in ("add", "swiglu_backward")
    grid = (config.pop("PROGRAMS", 1) * programs(a),)
    if block_m not in queues:
        queues[block_m] = schedule(offsets, rows, block_m)
    d_weights = None
    if kernel == "swiglu_backward":
        d_weights = torch.empty(triton.cdiv(width, block_n), rows, dtype=torch.float32, device=a.device)
    a, b = for_interpreter(a), for_interpreter(b)
    a_block, b_block = [block_m, block_k], [1, *((block_n, block_k) if transposed else (block_k, block_n))]
    matrices = b
    if merged:
        b_block, matrices = [1, 2, block_n, block_k], b.unflatten(1, (2, width))
    written = [ragged(t, block_m, block_n) if stores and t is not None else t for t in (out, inner)]
    _rows_kernel[grid](
        *(TensorDescriptor.from_tensor(a, a_block) if descriptors and not gather else a, a.stride(0)),
        *(TensorDescriptor.from_tensor(matrices, b_block) if descriptors else b, b.stride(0), b.stride(1)),
        *(bias, *written, d_inner, weights, d_weights),
        *(order, offsets, queues[block_m], rows, width, a.shape[1]),
        TOP_K=top_k,
        GATHER=gather,
        TRANSPOSED=transposed,
        EPILOGUE={"swiglu": SWIGLU, "swiglu_backward": SWIGLU_BACKWARD, "add": ADD}.get(kernel, PLAIN),
        SAVE=inner is not None,
        A_DESCRIPTOR=descriptors and not gather,
        B_DESCRIPTOR=descriptors,
        EVEN_N=width % block_n == 0,
        EVEN_K=a.shape[1] % block_k == 0,
        MERGED=merged,
        STORES=stores,
        DTYPE=TYPES[out.dtype],
        PRECISION=precision(a.dtype),
        FLATTEN=flatten,
        **config,
    )
    return d_weights


def library_takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``F.grouped_mm`` serves on this CUDA device.

    On Hopper only: on Blackwell it leaves garbage for an expert without rows (pytorch issue 172439), and for other
    types and devices it waits for the offsets.
    """
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] == 9
