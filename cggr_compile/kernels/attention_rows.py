"""Triton kernels of ``cggr::attention_rows_backward`` (FlashAttention-2, arXiv 2307.08691, algorithm 2, over rows).

The specification is ``cggr_compile.ops.attention_rows.attention_rows_backward_reference``. Two launches:

- ``_dq_kernel``: a program owns a block of selected queries and walks over the keys up to the last position that one
  of its queries attends to. It also writes delta = rowsum(grad * out) and a logsumexp that is never -inf.
- ``_dkv_kernel``: a program owns a block of keys (all positions, or gathered at ``rows``) and walks over the selected
  queries.

Both mask only blocks where something is masked by position or by the end of the sequence. The bounds come from the
positions themselves, so they are exact in whatever order the rows are.
Tensors may have any strides as long as the last one is 1; products of a stride and a position are 64 bits wide.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
SCAN = tl.constexpr(1024)  # rows looked at together when bounding the walk over queries

# A length that happens to be 1 or a multiple of 16 is not worth a compilation of its own.
LENGTHS = ["heads", "slots", "length"]


@triton.jit
def _probabilities(scores, lse, mask_tile, inside, scale, MASK: tl.constexpr):
    """exp(scale * scores + mask - lse), with exp2, which is what the hardware has."""
    if MASK == "none":
        return tl.exp2(scores * (scale * LOG2E) - lse * LOG2E)
    bias = tl.load(mask_tile, mask=inside, other=0)
    if MASK == "bool":
        scores = tl.where(bias != 0, scores * scale, float("-inf"))
    else:
        scores = scores * scale + bias.to(tl.float32)
    # subtract first: a mask of finfo.min times LOG2E would be -inf, and -inf - -inf is NaN
    return tl.exp2((scores - lse) * LOG2E)


@triton.jit
def _capped(scores, scale, softcap):
    """softcap * tanh(scale * scores / softcap), and its derivative but for the scale."""
    bend = 2.0 * tl.sigmoid(scores * (2.0 * scale / softcap)) - 1.0
    return softcap * bend, 1.0 - bend * bend


@triton.jit(do_not_specialize=LENGTHS)
def _dq_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    rows_ptr,
    mask_ptr,
    dq_ptr,
    delta_ptr,
    finite_lse_ptr,
    grad_b,
    grad_h,
    grad_s,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    out_b,
    out_h,
    out_s,
    lse_b,
    lse_h,
    lse_s,
    rows_b,
    rows_s,
    mask_b,
    mask_h,
    mask_s,
    mask_k,
    heads,
    slots,
    length,
    scale,
    softcap,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    slots = tl.cast(slots, tl.int32)  # Inductor makes a 1 a constant,
    length = tl.cast(length, tl.int32)
    scale = tl.cast(scale, tl.float32)  # and a Python float 64 bits wide
    softcap = tl.cast(softcap, tl.float32)
    left = 1.0 if CAP else scale  # what the scores are still to be multiplied by
    program = tl.program_id(0)
    blocks = tl.cdiv(slots, BLOCK_M)
    sharing = tl.num_programs(0) // blocks  # heads of the whole batch
    block = blocks - 1 - program // sharing  # under a causal mask later queries take longer: start with them
    head = (program % sharing % heads).to(tl.int64)
    batch = (program % sharing // heads).to(tl.int64)

    slot = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = slot < slots
    d = tl.arange(0, BLOCK_D)
    column = (d < D)[None, :]
    tile = inside[:, None] & column
    q_base = q_ptr + batch * q_b + head * q_h
    grad_base = grad_ptr + batch * grad_b + head * grad_h
    out_base = out_ptr + batch * out_b + head * out_h
    q = tl.load(q_base + slot[:, None] * q_s + d[None, :], mask=tile, other=0.0)
    grad = tl.load(grad_base + slot[:, None] * grad_s + d[None, :], mask=tile, other=0.0)
    out = tl.load(out_base + slot[:, None] * out_s + d[None, :], mask=tile, other=0.0)
    lse_row = lse_ptr + batch * lse_b + head * lse_h
    lse = tl.load(lse_row + slot * lse_s, mask=inside, other=float("inf"))
    # +inf makes every probability of a fully masked query, and of a slot past the end, zero
    lse = tl.where(tl.abs(lse) < float("inf"), lse, float("inf"))
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    flat = (batch * heads + head) * slots + slot
    tl.store(finite_lse_ptr + flat, lse, mask=inside)
    tl.store(delta_ptr + flat, delta, mask=inside)

    if CAUSAL:
        rows_base = rows_ptr + batch * rows_b
        position = tl.load(rows_base + slot * rows_s, mask=inside, other=0).to(tl.int32)
        end = tl.minimum(tl.max(position, 0) + 1, length)
        edge = tl.minimum(tl.min(tl.where(inside, position, length), 0) + 1, length)
    else:
        end = length
        edge = length
    edge = edge // BLOCK_N * BLOCK_N  # every query of the block attends to every key before the edge

    k_row = k_ptr + batch * k_b + head // GROUP * k_h
    v_row = v_ptr + batch * v_b + head // GROUP * v_h
    step = tl.arange(0, BLOCK_N)
    k_tile = step[:, None] * k_s + d[None, :]
    v_tile = step[:, None] * v_s + d[None, :]
    mask_row = mask_ptr + batch * mask_b + head * mask_h
    mask_tile = slot[:, None] * mask_s + step[None, :] * mask_k

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for stage in tl.static_range(2):
        if stage == 0:
            low = edge * 0
            high = edge
        else:
            low = edge
            high = end
        k_base = k_row + low.to(tl.int64) * k_s
        v_base = v_row + low.to(tl.int64) * v_s
        mask_base = mask_row + low.to(tl.int64) * mask_k
        for start in range(low, high, BLOCK_N):
            key = start + step
            known = key < length
            loaded = column
            if stage == 1:
                loaded = known[:, None] & column
            k = tl.load(k_base + k_tile, mask=loaded, other=0.0)
            v = tl.load(v_base + v_tile, mask=loaded, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            seen = inside[:, None] & known[None, :]
            if CAP:
                scores, bent = _capped(scores, scale, softcap)
            p = _probabilities(scores, lse[:, None], mask_base + mask_tile, seen, left, MASK)
            if stage == 1:
                if CAUSAL:
                    p = tl.where(position[:, None] >= key[None, :], p, 0.0)
                # the keys are summed over: past the end p may be anything, up to inf
                p = tl.where(known[None, :], p, 0.0)
            slope = p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
            if CAP:
                slope *= bent
            dq = tl.dot(slope.to(k.dtype), k, dq, input_precision="ieee")
            k_base += BLOCK_N * k_s
            v_base += BLOCK_N * v_s
            mask_base += BLOCK_N * mask_k
    tl.store(dq_ptr + flat[:, None] * D + d[None, :], (dq * scale).to(dq_ptr.dtype.element_ty), mask=tile)


@triton.jit(do_not_specialize=LENGTHS)
def _dkv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    rows_ptr,
    mask_ptr,
    delta_ptr,
    finite_lse_ptr,
    dk_ptr,
    dv_ptr,
    grad_b,
    grad_h,
    grad_s,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    rows_b,
    rows_s,
    mask_b,
    mask_h,
    mask_s,
    mask_k,
    heads,  # of the keys
    slots,
    length,
    scale,
    softcap,
    GROUP: tl.constexpr,  # query heads that share a key head
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    ALL_KEYS: tl.constexpr,
    WHOLE: tl.constexpr,  # there are BLOCK_M queries or more
    TOGETHER: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    slots = tl.cast(slots, tl.int32)  # Inductor makes a 1 a constant,
    length = tl.cast(length, tl.int32)
    scale = tl.cast(scale, tl.float32)  # and a Python float 64 bits wide
    softcap = tl.cast(softcap, tl.float32)
    left = 1.0 if CAP else scale  # what the scores are still to be multiplied by
    keys = length if ALL_KEYS else slots
    program = tl.program_id(0)
    blocks = tl.cdiv(keys, BLOCK_N)
    sharing = tl.num_programs(0) // blocks  # heads of the whole batch
    block = program // sharing  # under a causal mask earlier keys take longer: start with them
    head = (program % sharing % heads).to(tl.int64)
    batch = (program % sharing // heads).to(tl.int64)

    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = key < keys
    d = tl.arange(0, BLOCK_D)
    column = (d < D)[None, :]
    tile = inside[:, None] & column
    rows_base = rows_ptr + batch * rows_b
    position = key.to(tl.int64)
    if not ALL_KEYS:
        position = tl.load(rows_base + position * rows_s, mask=inside, other=0)
    k_base = k_ptr + batch * k_b + head * k_h
    v_base = v_ptr + batch * v_b + head * v_h
    k = tl.load(k_base + position[:, None] * k_s + d[None, :], mask=tile, other=0.0)
    v = tl.load(v_base + position[:, None] * v_s + d[None, :], mask=tile, other=0.0)

    low = slots * 0
    edge = slots * 0
    if CAUSAL:
        # No query before `low` sees a key of this block; every query from `edge` on sees them all.
        nearest = tl.min(tl.where(inside, position, length), 0)
        farthest = tl.max(tl.where(inside, position, 0), 0)
        low = slots
        for start in range(0, slots, SCAN):
            slot = start + tl.arange(0, SCAN)
            row = tl.load(rows_base + slot.to(tl.int64) * rows_s, mask=slot < slots, other=-1)
            low = tl.minimum(low, tl.min(tl.where(row >= nearest, slot, slots), 0))
            edge = tl.maximum(edge, tl.max(tl.where((row < farthest) & (slot < slots), slot + 1, 0), 0))
        low = low // BLOCK_M * BLOCK_M

    step = tl.arange(0, BLOCK_M)
    q_tile = step[:, None] * q_s + d[None, :]
    grad_tile = step[:, None] * grad_s + d[None, :]
    mask_tile = step[None, :] * mask_s + position[:, None] * mask_k
    at = position.to(tl.int32)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    start = low - BLOCK_M
    q_head = head * GROUP - 1
    # One loop over the queries of all heads that share the key head, so that loads go on from one head to the next.
    for _ in range(GROUP * tl.cdiv(slots - low, BLOCK_M)):
        start += BLOCK_M
        start = tl.where(start < slots, start, low)
        q_head = tl.where(start == low, q_head + 1, q_head)
        begin = start
        if WHOLE:  # the last block ends with the last query; what it shares with the one before is masked below
            begin = tl.minimum(start, slots - BLOCK_M)
        slot = begin + step
        q_base = q_ptr + batch * q_b + q_head * q_h + begin.to(tl.int64) * q_s
        grad_base = grad_ptr + batch * grad_b + q_head * grad_h + begin.to(tl.int64) * grad_s
        flat = (batch * heads * GROUP + q_head) * slots + begin
        if WHOLE and D == BLOCK_D:  # a mask would cost as many instructions as the products leave time for
            q = tl.load(q_base + q_tile)
            grad = tl.load(grad_base + grad_tile)
        else:
            loaded = (slot < slots)[:, None] & column
            q = tl.load(q_base + q_tile, mask=loaded, other=0.0)
            grad = tl.load(grad_base + grad_tile, mask=loaded, other=0.0)
        if WHOLE:
            lse = tl.load(finite_lse_ptr + flat + step)
            delta = tl.load(delta_ptr + flat + step)
        else:
            lse = tl.load(finite_lse_ptr + flat + step, mask=slot < slots, other=float("inf"))
            delta = tl.load(delta_ptr + flat + step, mask=slot < slots, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        if TOGETHER:  # the second product runs while the first becomes probabilities; it takes registers
            slope = tl.dot(v, tl.trans(grad), input_precision="ieee")
        if CAP:
            scores, bent = _capped(scores, scale, softcap)
        seen = inside[:, None] & (slot < slots)[None, :]
        mask_base = mask_ptr + batch * mask_b + q_head * mask_h + begin.to(tl.int64) * mask_s
        p = _probabilities(scores, lse[None, :], mask_base + mask_tile, seen, left, MASK)
        if (start < edge) | (start + BLOCK_M > slots):
            own = (slot >= start) & (slot < slots)
            if CAUSAL:
                row = tl.load(rows_base + slot.to(tl.int64) * rows_s, mask=own, other=-1).to(tl.int32)
                p = tl.where(row[None, :] >= at[:, None], p, 0.0)
            else:
                p = tl.where(own[None, :], p, 0.0)
        if not TOGETHER:
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
            slope = tl.dot(v, tl.trans(grad), input_precision="ieee")
        slope = p * (slope - delta[None, :])
        if TOGETHER:
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
        if CAP:
            slope *= bent
        dk = tl.dot(slope.to(q.dtype), q, dk, input_precision="ieee")

    target = ((batch * heads + head) * keys + key)[:, None] * D + d[None, :]
    tl.store(dk_ptr + target, (dk * scale).to(dk_ptr.dtype.element_ty), mask=tile)
    tl.store(dv_ptr + target, dv.to(dv_ptr.dtype.element_ty), mask=tile)


INTERPRETED = not isinstance(_dq_kernel, triton.runtime.JITFunction)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
AXES = dict.fromkeys(("grad", "q", "k", "v", "out", "lse"), "bhs") | {"rows": "bs", "mask": "bhsk"}


class Sizes(NamedTuple):
    """query [batch, heads, slots, dim], key [batch, kv_heads, length, dim]."""

    batch: int
    heads: int
    kv_heads: int
    slots: int
    length: int
    dim: int


class Launch(NamedTuple):
    """A kernel, the names of its tensors, its other arguments, and the ways to run it, the best guess first."""

    kernel: Any
    tensors: tuple[str, ...]
    arguments: dict[str, Any]
    ways: list[tuple[int, dict[str, int]]]  # programs; block sizes, warps, stages

    def pointers(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Its arguments that are tensors, from all that there are."""
        return {f"{name}_ptr": tensors[name] for name in self.tensors}


def _options(queries: int, keys: int, warps: int, stages: int) -> dict[str, int]:
    return dict(BLOCK_M=queries, BLOCK_N=keys, num_warps=warps, num_stages=stages)


def block_options(
    dtype: torch.dtype, block_d: int, all_keys: bool
) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    """Block sizes, warps and stages worth trying for the dq and for the dkv kernel, the best guess first.

    In 16 bits up to 128 that is the fastest of a sweep (dq: H100, dkv: H200); else what ptxas fits into registers
    (float32 above 64 spills some).
    """
    if dtype == torch.float32:  # no tensor cores: ieee products
        both = [_options(32, 32, 8, 1) if block_d <= 128 else _options(16, 16, 8, 1)]
    elif block_d <= 64:
        for_dq = [_options(64, 64, 4, 3), _options(128, 64, 4, 3), _options(128, 64, 8, 2)]
        low, high = _options(32, 64, 4, 3), _options(64, 64, 4, 3)
        # three blocks share a multiprocessor only without the registers of TOGETHER
        alone = [{**low, "TOGETHER": False}] if all_keys else []
        return for_dq, [*alone, *({**option, "TOGETHER": True} for option in (high, low))]
    elif block_d <= 128:
        for_dq = [_options(64, 32, 4, 3), _options(64, 64, 4, 2), _options(128, 32, 8, 2)]
        for_dkv = [_options(32, 64, 4, 3), _options(64, 128, 8, 2), _options(32, 64, 4, 2)]
        return for_dq, [{**option, "TOGETHER": True} for option in for_dkv]
    else:
        both = [_options(32, 32, 8, 2), _options(32, 32, 4, 2), _options(16, 32, 4, 2)]
    return both, [{**option, "TOGETHER": False} for option in both]


def launches(
    sizes: Sizes,
    strides: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    scale: float,
    causal: bool,
    mask: Literal["none", "bool", "additive"],
    all_keys: bool,
    softcap: float,
) -> tuple[Launch, Launch]:
    """The two launches. ``strides`` by the names in AXES, of all axes but the last of width ``dim``."""
    block_d = max(16, triton.next_power_of_2(sizes.dim))
    keys = sizes.length if all_keys else sizes.slots
    constants = dict(GROUP=sizes.heads // sizes.kv_heads, CAUSAL=causal, MASK=mask, CAP=softcap != 0.0)
    constants |= dict(D=sizes.dim, BLOCK_D=block_d)
    for_dq, for_dkv = block_options(dtype, block_d, all_keys)
    for_dkv = [{**option, "WHOLE": sizes.slots >= option["BLOCK_M"]} for option in for_dkv]

    def launch(
        kernel: Any, read: tuple[str, ...], write: tuple[str, ...], heads: int, ways: Any, **more: Any
    ) -> Launch:
        steps = {f"{n}_{axis}": stride for n in read for axis, stride in zip(AXES[n], strides[n], strict=False)}
        sizes_of = dict(heads=heads, slots=sizes.slots, length=sizes.length, scale=float(scale), softcap=float(softcap))
        return Launch(kernel, (*read, *write), {**sizes_of, **steps, **constants, **more}, ways)

    def ways(rows: int, block: str, heads: int, options: list[dict[str, int]]) -> list[tuple[int, dict[str, int]]]:
        return [(triton.cdiv(rows, option[block]) * heads * sizes.batch, option) for option in options]

    return (
        launch(
            *(_dq_kernel, ("grad", "q", "k", "v", "out", "lse", "rows", "mask"), ("dq", "delta", "finite_lse")),
            *(sizes.heads, ways(sizes.slots, "BLOCK_M", sizes.heads, for_dq)),
        ),
        launch(
            *(_dkv_kernel, ("grad", "q", "k", "v", "rows", "mask"), ("delta", "finite_lse", "dk", "dv")),
            *(sizes.kv_heads, ways(keys, "BLOCK_N", sizes.kv_heads, for_dkv)),
            ALL_KEYS=all_keys,
        ),
    )


def _check(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    if not query.dtype == key.dtype == value.dtype == grad.dtype or query.dtype not in DTYPES:
        raise ValueError(f"one of {DTYPES} for all: query {query.dtype}, key {key.dtype}, grad {grad.dtype}")
    if grad.shape != query.shape or out.shape != query.shape or key.shape != value.shape:
        raise ValueError("grad, out and query must have one shape, and key and value must")
    if query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3] or query.shape[3] > 256:
        raise ValueError(f"query {tuple(query.shape)} does not fit key {tuple(key.shape)}, or heads wider than 256")


def attention_rows_backward_triton(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    all_keys: bool,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``attention_rows_backward_reference`` on CUDA."""
    _check(grad, query, key, value, out)
    if INTERPRETED and query.dtype == torch.bfloat16:  # whose bfloat16 products are wrong
        grad, query, key, value, out = (tensor.float() for tensor in (grad, query, key, value, out))
        dq, dk, dv = attention_rows_backward_triton(
            grad, query, key, value, out, logsumexp, rows, mask, scale, causal, all_keys, softcap
        )
        return dq.bfloat16(), dk.bfloat16(), dv.bfloat16()

    batch, heads, slots, dim = query.shape
    kv_heads, length = key.shape[1:3]
    dq = query.new_empty(query.shape)
    dk, dv = (tensor.new_empty(batch, kv_heads, length if all_keys else slots, dim) for tensor in (key, value))
    if not query.numel():
        return dq, dk.zero_(), dv.zero_()

    read = dict(zip(("grad", "q", "k", "v", "out"), (grad, query, key, value, out), strict=True))
    read = {name: tensor if tensor.stride(3) == 1 else tensor.contiguous() for name, tensor in read.items()}
    read |= {"lse": logsumexp, "rows": rows}
    kind: Literal["none", "bool", "additive"] = "none"
    if mask is not None:
        kind = "bool" if mask.dtype == torch.bool else "additive"
        read["mask"] = mask.expand(batch, heads, slots, length)
    strides = {name: tensor.stride() for name, tensor in read.items()}
    tensors = {**read, "dq": dq, "dk": dk, "dv": dv}
    if mask is None:
        strides["mask"], tensors["mask"] = (0, 0, 0, 0), rows  # any pointer: it is not read
    tensors["delta"], tensors["finite_lse"] = torch.empty(
        2, batch, heads, slots, dtype=torch.float32, device=query.device
    )
    sizes = Sizes(batch, heads, kv_heads, slots, length, dim)
    with torch.cuda.device_of(query):
        for launch in launches(sizes, strides, query.dtype, scale, causal, kind, all_keys, softcap):
            programs, options = launch.ways[0]
            launch.kernel[(programs,)](**launch.pointers(tensors), **launch.arguments, **options)
    return dq, dk, dv
