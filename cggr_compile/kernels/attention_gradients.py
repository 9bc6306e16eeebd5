"""Triton kernels for the gradients of attention from selected rows (FlashAttention-2, arXiv 2307.08691, algorithm 2).

The specification is ``cggr_compile.ops.attention_rows.attention_rows_backward_reference``.

- ``dq_kernel``: a program owns a block of selected queries and walks over the keys up to the last position that one
  of its queries attends to. It also writes delta = rowsum(grad * out) and a logsumexp that is never -inf.
- ``dkv_kernel``: a program owns a block of keys (all positions, or gathered at ``rows``) and walks over the selected
  queries.

Both mask only blocks where something is masked by position or by the end of the sequence. The bounds come from the
positions themselves, so they are exact in whatever order the rows are.
Tensors may have any strides as long as the last one is 1; products of a stride and a position are 64 bits wide.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from cggr_compile.kernels.common import LOG2E

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
def dq_kernel(
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
def dkv_kernel(
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
