"""Triton kernels for grouped matrix products: rows sorted by expert, a matrix per expert.

``_rows_kernel`` multiplies every row with its expert's matrix. It is persistent: one program per multiprocessor walks
over a queue of tiles that spans all experts, so that an expert with few rows leaves nobody idle. Rows may be gathered
as they are loaded (a row of the order names a token), and SwiGLU, or its derivative, is applied to the product before
it is stored. ``_weight_gradient_kernel`` sums outer products of rows, expert by expert; as the number of its tiles
depends on shapes alone, each has its own program.

An expert's matrix is read through tensor descriptors (TMA) on Hopper and later, and so are rows that are not gathered.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cggr_compile.kernels.score import INTERPRETED, has_descriptors, precision

LIBRARY_COLUMNS = 1024
GATHERED = ("inner", "swiglu", "swiglu_backward", "d_activation")  # kernels that are given a row for every token

PLAIN, SWIGLU, SWIGLU_BACKWARD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


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
def _grouped(tile, rows, columns, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows walk over the columns together, as neighbours in time share operands."""
    first = tile // (GROUP * columns) * GROUP
    size = tl.minimum(rows - first, GROUP)
    inside = tile % (GROUP * columns)
    return first + inside % size, inside // size


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
def _halves(tile):
    """The left and the right half of a tile's columns."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def rows_tile(
    tile, row_tiles, a_ptr, a_stride, b_ptr, b_expert, b_row, order_ptr, offsets_ptr, schedule_ptr, N, K,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, EPILOGUE: tl.constexpr,
    A_DESCRIPTOR: tl.constexpr, B_DESCRIPTOR: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of the queue: its expert, the expert's last row + 1, the number of the tile's columns, its rows
    [BLOCK_M] and columns [BLOCK_N], which of its entries there are, and the product; of SWIGLU those of gate and up."""
    column_tiles = tl.cdiv(N, BLOCK_N)
    EVEN: tl.constexpr = EVEN_N and EVEN_K
    row_tile, column_tile = _grouped(tile, row_tiles, column_tiles, GROUP)
    expert = tl.load(schedule_ptr + 1 + 2 * row_tile)
    first = tl.load(schedule_ptr + 2 + 2 * row_tile)
    end = tl.load(offsets_ptr + expert + 1)
    low = column_tile * BLOCK_N
    if not A_DESCRIPTOR:  # rows past the expert's end read its last one
        source = tl.minimum(first + tl.arange(0, BLOCK_M), end - 1)
        if GATHER:
            source = tl.load(order_ptr + source) // TOP_K
        a_rows = a_ptr + source.to(tl.int64)[:, None] * a_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
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
        b = _expert_tile(
            b_ptr, b_expert, b_row, expert, low, step, N, K, B_DESCRIPTOR, TRANSPOSED, EVEN, BLOCK_N, BLOCK_K
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if EPILOGUE == SWIGLU:  # the up rows follow the N rows of the gate
            b = _expert_tile(
                b_ptr, b_expert, b_row, expert, low + N, step, 2 * N, K, B_DESCRIPTOR, TRANSPOSED, EVEN,
                BLOCK_N, BLOCK_K
            )  # fmt: skip
            up = tl.dot(a, b, up, input_precision=PRECISION)
    row = first + tl.arange(0, BLOCK_M)
    column = low + tl.arange(0, BLOCK_N)
    inside = (row < end)[:, None]
    if not EVEN_N:
        inside = inside & (column < N)[None, :]
    return expert, end, column_tile, row, column, inside, acc, up


@triton.jit
def through_swiglu(gate, up, row, column, inside, inner_ptr, N, DTYPE: tl.constexpr, SAVE: tl.constexpr):
    """silu(gate) * up of a tile; ``inner`` [rows, 2 N] gets gate and up, beside each other, if SAVE."""
    gate = gate.to(DTYPE)  # rounded as it is saved: the backward sees what the forward saw
    up = up.to(DTYPE)
    if SAVE:
        gate_at = row.to(tl.int64)[:, None] * (2 * N) + column[None, :]
        tl.store(inner_ptr + gate_at, gate, mask=inside)
        tl.store(inner_ptr + gate_at + N, up, mask=inside)
    gate = gate.to(tl.float32)
    return gate * tl.sigmoid(gate) * up.to(tl.float32)


@triton.jit
def _back_through_some(
    d_activation, low, row, end, weight, inner_ptr, d_inner_ptr, out_ptr, N, EVEN_N: tl.constexpr
):  # fmt: skip
    """Back through SwiGLU for some columns of a tile; returns their share of the gradient of the routing weights."""
    column = low + tl.arange(0, d_activation.shape[1])
    inside = (row < end)[:, None]
    if not EVEN_N:
        inside = inside & (column < N)[None, :]
    gate_at = row.to(tl.int64)[:, None] * (2 * N) + column[None, :]
    gate = tl.load(inner_ptr + gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(inner_ptr + gate_at + N, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_weight = tl.sum(d_activation * silu * up, 1)
    at = row.to(tl.int64)[:, None] * N + column[None, :]
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
    # a quarter of the columns at a time: the whole tile's gate, up and gradients do not fit the registers
    left, right = _halves(d_activation)
    d_weight = tl.zeros([BLOCK_M], tl.float32)
    for half in tl.static_range(2):
        parts = _halves(left if half == 0 else right)
        for quarter in tl.static_range(2):
            d_weight += _back_through_some(
                parts[quarter], column_tile * BLOCK_N + (2 * half + quarter) * (BLOCK_N // 4), row, end, weight,
                inner_ptr, d_inner_ptr, out_ptr, N, EVEN_N
            )  # fmt: skip
    return d_weight


@triton.jit
def _rows_kernel(
    a_ptr, a_stride, b_ptr, b_expert, b_row, bias_ptr, out_ptr, inner_ptr, d_inner_ptr, weights_ptr, d_weights_ptr,
    order_ptr, offsets_ptr, schedule_ptr, rows, N, K,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, EPILOGUE: tl.constexpr, SAVE: tl.constexpr,
    A_DESCRIPTOR: tl.constexpr, B_DESCRIPTOR: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.load(schedule_ptr)
    tiles = row_tiles * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        expert, end, column_tile, row, column, inside, acc, up = rows_tile(
            tile, row_tiles, a_ptr, a_stride, b_ptr, b_expert, b_row, order_ptr, offsets_ptr, schedule_ptr, N, K,
            TOP_K, GATHER, TRANSPOSED, EPILOGUE, A_DESCRIPTOR, B_DESCRIPTOR, EVEN_N, EVEN_K, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP
        )  # fmt: skip
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        if EPILOGUE == PLAIN:
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + expert.to(tl.int64) * N + column, mask=column < N, other=0.0)
                acc += bias.to(tl.float32)[None, :]
            tl.store(out_ptr + at, acc, mask=inside)
        elif EPILOGUE == SWIGLU:
            value = through_swiglu(acc, up, row, column, inside, inner_ptr, N, out_ptr.dtype.element_ty, SAVE)
            tl.store(out_ptr + at, value, mask=inside)
        else:
            d_weight = back_through_swiglu(
                acc, column_tile, row, end, order_ptr, weights_ptr, inner_ptr, d_inner_ptr, out_ptr, N,
                EVEN_N, BLOCK_M, BLOCK_N
            )  # fmt: skip
            tl.store(d_weights_ptr + column_tile.to(tl.int64) * rows + row, d_weight, mask=row < end)


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
    row_tile, column_tile = _grouped(tile, row_tiles, column_tiles, GROUP)
    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for low in range(start, end, BLOCK_K):
        row = low + tl.arange(0, BLOCK_K)
        inside = (row < end)[:, None]
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


def configuration(kernel: str, dtype: torch.dtype, columns: int = 0) -> dict[str, Any]:
    """Tile sizes of ``swiglu`` (two products at a time), ``down``, ``swiglu_backward``, ``d_hidden``, ``d_gate_up``,
    ``d_down``, those of 16 bits measured on an H100 (``python benchmarks/moe.py --sweep``); of ``inner`` and
    ``d_activation``, guessed from these.

    ``columns`` of the result where TMA loads tiles: with many, every row is read so often that ``swiglu`` gathers the
    rows beforehand.
    """
    narrow = kernel in ("swiglu", "swiglu_backward")
    if dtype == torch.float32:
        return dict(BLOCK_M=64, BLOCK_N=64 if narrow else 128, BLOCK_K=32, GROUP=8, num_warps=4, num_stages=3)
    tile = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP=8, num_warps=8, num_stages=4)
    if kernel == "swiglu":
        often = columns >= 2048
        return tile | dict(FLATTEN=False, GATHER=not often, num_stages=4 if often else 3)
    return tile | dict(BLOCK_N=256, num_stages=3) if kernel in ("down", "d_hidden") else tile


def configurations(kernel: str) -> list[dict[str, Any]]:
    """What is to be tried for 16 bits where there is somebody to time it: tile sizes with 128 rows where rows are
    multiplied, :func:`configuration` among them. Here ``swiglu`` gathers rows as it loads them."""
    one = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP=8, num_warps=8, num_stages=3)
    deep = one | dict(num_stages=4)
    wide = one | dict(BLOCK_N=256)
    narrow = one | dict(BLOCK_K=32, num_stages=4)
    if kernel in ("d_gate_up", "d_down"):
        return [one, deep, wide, wide | dict(num_stages=4), one | dict(BLOCK_M=256), narrow]
    if kernel == "swiglu_backward":  # the parts of its sum are made for 128 columns
        return [tile | dict(FLATTEN=flatten) for tile in (one, deep, narrow) for flatten in (True, False)]
    if kernel == "swiglu":
        two = one | dict(BLOCK_N=64, num_stages=4)
        return [one | dict(FLATTEN=True), *(tile | dict(FLATTEN=False) for tile in (one, deep, narrow, two))]
    return [tile | dict(FLATTEN=flatten) for tile in (wide, deep) for flatten in (True, False)]


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


def contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _for_interpreter(tensor: Tensor) -> Tensor:
    return tensor.float() if INTERPRETED and tensor.dtype == torch.bfloat16 else tensor  # its bfloat16 is wrong


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
    ================  =============  ============  ==========================================================

    Args:
        a: where it is [tokens, K], row r is a[order[r] // top_k].
        b: stored in either order of its last two dimensions. bias: [E, N], added to what is only a product.
        offsets: int32 [E + 1]. order: int32 [rows]; both as ``moe_permute`` returns them.
        inner: None (swiglu only): gate and up are not kept. weights: [tokens * top_k], contiguous.
        queues: schedules by BLOCK_M, for calls with the same offsets to share.
        overrides: of :func:`configuration`, and of DESCRIPTORS (load by TMA), FLATTEN, PROGRAMS (grid),
            GATHER (False: gather the rows of ``a`` in a kernel before, so that they can be loaded by TMA).

    Returns:
        of ``swiglu_backward``: float32 [column tiles, rows], parts of the gradient of each row's routing weight.
    """
    gather, transposed = kernel in GATHERED, kernel in ("inner", "swiglu", "down")
    if stored_transposed(b):
        b, transposed = b.mT, not transposed
    a, b = contiguous_rows(a), contiguous_rows(b)
    bias = None if bias is None else bias.contiguous()
    rows, width = out.shape
    config: dict[str, Any] = {**configuration(kernel, a.dtype, width if has_descriptors(b) else 0), **overrides}
    if gather and not config.pop("GATHER", True):
        assert order is not None
        a, gather = a[order // top_k], False
    descriptors = config.pop("DESCRIPTORS", has_descriptors(b) and (gather or has_descriptors(a)))
    # one loop over tiles and steps: loads of the next tile start before this one is stored, for more shared memory
    config.setdefault("FLATTEN", descriptors)
    grid = (config.pop("PROGRAMS", None) or programs(a),)
    block_m, block_n, block_k = (config[f"BLOCK_{axis}"] for axis in "MNK")
    if block_m not in queues:
        queues[block_m] = schedule(offsets, rows, block_m)
    d_weights = None
    if kernel == "swiglu_backward":
        d_weights = torch.empty(triton.cdiv(width, block_n), rows, dtype=torch.float32, device=a.device)
    a, b = _for_interpreter(a), _for_interpreter(b)
    a_block, b_block = [block_m, block_k], [1, *((block_n, block_k) if transposed else (block_k, block_n))]
    _rows_kernel[grid](
        *(TensorDescriptor.from_tensor(a, a_block) if descriptors and not gather else a, a.stride(0)),
        *(TensorDescriptor.from_tensor(b, b_block) if descriptors else b, b.stride(0), b.stride(1)),
        *(bias, out, inner, d_inner, weights, d_weights, order, offsets, queues[block_m], rows, width, a.shape[1]),
        TOP_K=top_k,
        GATHER=gather,
        TRANSPOSED=transposed,
        EPILOGUE={"swiglu": SWIGLU, "swiglu_backward": SWIGLU_BACKWARD}.get(kernel, PLAIN),
        SAVE=inner is not None,
        A_DESCRIPTOR=descriptors and not gather,
        B_DESCRIPTOR=descriptors,
        EVEN_N=width % block_n == 0,
        EVEN_K=a.shape[1] % block_k == 0,
        PRECISION=precision(a.dtype),
        **config,
    )
    return d_weights


def weight_gradient(
    kernel: str, left: Tensor, right: Tensor, order: Tensor, offsets: Tensor, top_k: int, **overrides: Any
) -> Tensor:
    """[E, M, N]: ``sum_r left[r]^T right[r]`` over the rows r of every expert e; zero without rows.

    Args:
        kernel: ``d_gate_up``: left is [rows, M], right [tokens, N]. ``d_down``: left is [tokens, M], right [rows, N].
            Row r of what is [tokens, ...] is that of the token order[r] // top_k.
        overrides: of :func:`configuration`, and of LIBRARY (:func:`library_pays`).
    """
    left, right = contiguous_rows(left), contiguous_rows(right)
    gathers_left = kernel == "d_down"
    config = {**configuration(kernel, left.dtype), **overrides}
    if config.pop("LIBRARY", library_pays(left, right, gathers_left)):
        token = order // top_k
        left, right = (left[token], right) if gathers_left else (left, right[token])
        return F.grouped_mm(left.t(), right, offs=offsets[1:])
    experts, m, n = offsets.shape[0] - 1, left.shape[1], right.shape[1]
    out = left.new_empty(experts, m, n)
    left, right = _for_interpreter(left), _for_interpreter(right)
    tiles = triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"])
    _weight_gradient_kernel[(experts * tiles,)](
        *(left, left.stride(0), right, right.stride(0), out, order, offsets, m, n),
        TOP_K=top_k,
        GATHER_LEFT=gathers_left,
        GATHER_RIGHT=not gathers_left,
        EVEN=m % config["BLOCK_M"] == 0 and n % config["BLOCK_N"] == 0,
        PRECISION=precision(left.dtype),
        **config,
    )
    return out


def library_takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``F.grouped_mm`` serves on this CUDA device.

    On Hopper only: on Blackwell it leaves garbage for an expert without rows (pytorch issue 172439), and for other
    types and devices it waits for the offsets.
    """
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] == 9


def library_pays(left: Tensor, right: Tensor, gathers_left: bool) -> bool:
    """Whether to gather the rows and leave a weight gradient to ``F.grouped_mm``.

    On an H100 that is 1.7 times as fast as our kernel, which wins the gather back from about 700 columns of the other
    factor on.
    """
    if not left.is_cuda or not library_takes(left.device, left.dtype):
        return False
    aligned = all(has_descriptors(t) and t.shape[1] % 8 == 0 for t in (left, right))
    return aligned and (right if gathers_left else left).shape[1] >= LIBRARY_COLUMNS
