"""Triton kernels of ``cggr::moe_top_experts`` and ``cggr::moe_permute``: deterministic, nothing waits for the device.

The specifications are the references in ``cggr_compile.ops.moe_routing``. The permutation is a counting sort in two
launches. Each program of the first counts the experts in its chunk of assignments. Each program of the second adds up
the counts (where every expert's rows begin, and how many of them earlier chunks fill), sorts its own chunk by (expert,
assignment) and writes it to its places.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # assignments that one program sorts
CHUNKS_AT_ONCE = tl.constexpr(16)  # rows of the table of counts that are added up together


@triton.jit(do_not_specialize=["N"])
def _top_experts_kernel(
    scores_ptr, row_stride, column_stride, out_ptr, N, E,
    TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANES)[None, :]
    inside = (row < N)[:, None] & (lane < E)
    at = row.to(tl.int64)[:, None] * row_stride + lane * column_stride
    scores = tl.load(scores_ptr + at, mask=inside, other=0.0).to(tl.float32)
    left = tl.broadcast_to(lane < E, [BLOCK_N, LANES])
    for slot in tl.static_range(TOP_K):
        best = tl.max(tl.where(left, scores, float("-inf")), 1)
        expert = tl.min(tl.where(left & (scores == best[:, None]), lane, LANES), 1)
        # NaN equals nothing: take the first that is left
        expert = tl.where(expert == LANES, tl.min(tl.where(left, lane, LANES), 1), expert)
        tl.store(out_ptr + row.to(tl.int64) * TOP_K + slot, expert.to(tl.int64), mask=row < N)
        left = left & (lane != expert[:, None])


@triton.jit
def _experts_of(experts_ptr, assignment, A, E):
    """The expert of each assignment; E stands for none, and for what is past the end."""
    expert = tl.load(experts_ptr + assignment, mask=assignment < A, other=-1)
    return tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)


@triton.jit(do_not_specialize=["A", "E"])
def _count_kernel(experts_ptr, counts_ptr, A, E, CHUNK: tl.constexpr, LANES: tl.constexpr):
    chunk = tl.program_id(0)
    expert = _experts_of(experts_ptr, chunk * CHUNK + tl.arange(0, CHUNK), A, E)
    tl.store(counts_ptr + chunk * LANES + tl.arange(0, LANES), tl.histogram(expert, LANES))


@triton.jit(do_not_specialize=["A", "E", "chunks"])
def _place_kernel(
    experts_ptr, counts_ptr, order_ptr, position_ptr, offsets_ptr, A, E, chunks,
    CHUNK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    lane = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.int32)
    earlier = total
    for first in range(0, chunks, CHUNKS_AT_ONCE):
        row = first + tl.arange(0, CHUNKS_AT_ONCE)[:, None]
        counts = tl.load(counts_ptr + row * LANES + lane[None, :], mask=row < chunks, other=0)
        total += tl.sum(counts, 0)
        earlier += tl.sum(tl.where(row < chunk, counts, 0), 0)
    start = tl.cumsum(total, 0) - total
    if chunk == 0:
        tl.store(offsets_ptr + lane, start, mask=lane <= E)

    local = tl.arange(0, CHUNK)
    expert = _experts_of(experts_ptr, chunk * CHUNK + local, A, E)
    ordered = tl.sort(expert * CHUNK + local)
    expert, assignment = ordered // CHUNK, chunk * CHUNK + ordered % CHUNK
    mine = tl.load(counts_ptr + chunk * LANES + lane)
    # a row of the sorted chunk is so far from its place in the order
    shift = start + earlier - (tl.cumsum(mine, 0) - mine)
    place = local + tl.gather(shift, expert, 0)
    tl.store(order_ptr + place, assignment, mask=assignment < A)
    tl.store(position_ptr + assignment, place, mask=assignment < A)


def top_experts_triton(scores: Tensor, top_k: int) -> Tensor:
    """As the reference, for scores that float32 represents."""
    tokens, experts = scores.shape
    out = torch.empty(tokens, top_k, dtype=torch.int64, device=scores.device)
    lanes = triton.next_power_of_2(experts)
    block = max(1, 2048 // lanes)
    if not tokens:
        return out
    with torch.cuda.device_of(scores):
        _top_experts_kernel[(triton.cdiv(tokens, block),)](
            *(scores, *scores.stride(), out, tokens, experts), TOP_K=top_k, BLOCK_N=block, LANES=lanes
        )
    return out


def permute_triton(experts: Tensor, num_experts: int, chunk: int = CHUNK) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference. ``chunk``: a power of 2."""
    flat = experts.reshape(-1).contiguous()
    rows = flat.numel()
    order, position = (torch.empty(rows, dtype=torch.int32, device=flat.device) for _ in range(2))
    if not rows:
        return order, position, order.new_zeros(num_experts + 1)
    chunks = triton.cdiv(rows, chunk)
    lanes = max(32, triton.next_power_of_2(num_experts + 1))
    counts = order.new_empty(chunks, lanes)
    offsets = order.new_empty(num_experts + 1)
    sizes = dict(CHUNK=chunk, LANES=lanes, num_warps=8 if chunk >= 1024 else 4)
    with torch.cuda.device_of(flat):
        _count_kernel[(chunks,)](flat, counts, rows, num_experts, **sizes)
        _place_kernel[(chunks,)](flat, counts, order, position, offsets, rows, num_experts, chunks, **sizes)
    return order, position, offsets
