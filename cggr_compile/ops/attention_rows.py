"""``cggr::attention_rows_backward``: the backward of attention from the selected queries only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cggr_compile.compat import runs_our_kernels
from cggr_compile.ops.library import LIBRARY, define_opaque

QUERIES = 64  # of a block on the CPU: the fastest of 16 to 128 at 4 x 6 heads x 128 queries x 512 keys


def attention_rows_backward_reference(
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
    """Gradients of ``softmax(cap(scale q k^T) + mask) v`` where only the queries at ``rows`` have an output gradient.

    With P = exp(cap(scale q k^T) + mask - logsumexp), delta = rowsum(grad * out) and
    dS = P * (grad v^T - delta) * cap':  dq = scale dS k,  dk = scale dS^T q,  dv = P^T grad
    (FlashAttention-2, arXiv 2307.08691, algorithm 2, over the selected rows).

    Args:
        grad, query, out: [B, heads, K, D] at the selected positions. logsumexp: float32 [B, heads, K], natural log.
        key, value: [B, kv_heads, S, D], all positions; ``heads / kv_heads`` consecutive query heads share a key head
            (grouped-query attention, arXiv 2305.13245).
        rows: int64 [B, K], position of each query; those in use come first, in ascending order.
        mask: [B or 1, heads or 1, K, S], bool (True attends) or additive, at the selected queries; or None.
        causal: a query at position i attends to keys at positions <= i.
        all_keys: key and value gradients for all positions, [B, kv_heads, S, D]; else for the keys at ``rows`` only,
            [B, kv_heads, K, D].
        softcap: cap(s) = softcap tanh(s / softcap) (Gemma 2, arXiv 2408.00118); 0: none.

    Returns:
        dq [B, heads, K, D], dk, dv.
    """
    weights, slope = _weights_and_slope(
        grad, query, key, value, out, logsumexp, rows, mask, scale=scale, causal=causal, softcap=softcap
    )
    dq = _product(slope, key) * scale
    if not all_keys:
        weights, slope = _at_keys(weights, rows), _at_keys(slope, rows)
    return dq, _summed(slope, query, key.shape[1]) * scale, _summed(weights, grad, key.shape[1])


def attention_rows_backward_cpu(
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
    """``attention_rows_backward_reference``, block by block of queries: each leaves out the keys after its last one.

    For the CPU, where reading positions costs nothing; anywhere else it would wait for the device.
    """
    batch, _, slots, dim = query.shape
    kv_heads, length = key.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)  # sums of blocks
    dq = torch.empty_like(query, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(batch, kv_heads, length if all_keys else slots, dim, dtype=wide) for _ in range(2))
    for begin in range(0, slots, QUERIES):
        end = min(begin + QUERIES, slots)
        # rows in use ascend: none of these queries attends to a later key, or to one selected after `end`
        seen = min(_last_of(rows[:, :end]) + 1, length) if causal and rows.numel() else length
        of_block, keys = (slice(None), slice(None), slice(begin, end)), (slice(None), slice(None), slice(seen))
        weights, slope = _weights_and_slope(
            *(grad[of_block], query[of_block], key[keys], value[keys], out[of_block], logsumexp[of_block]),
            *(rows[:, begin:end], None if mask is None else mask[:, :, begin:end, :seen]),
            scale=scale,
            causal=causal,
            softcap=softcap,
        )
        dq[of_block] = _product(slope, key[keys]) * scale
        if not all_keys:
            seen = end if causal else slots
            weights, slope = _at_keys(weights, rows[:, :seen]), _at_keys(slope, rows[:, :seen])
        dk[:, :, :seen] += _summed(slope, query[of_block], kv_heads)
        dv[:, :, :seen] += _summed(weights, grad[of_block], kv_heads)
    return dq, dk.mul_(scale).to(key.dtype), dv.to(value.dtype)


def _last_of(rows: Tensor) -> int:
    return int(rows.max())


def _weights_and_slope(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    causal: bool,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """P and dS of the reference's formulas, [B, heads, K, S] each."""
    scores = _product(query, key.transpose(-2, -1)).to(torch.promote_types(query.dtype, torch.float32))
    scores *= scale
    bend = torch.tanh(scores / softcap) if softcap else None
    if bend is not None:
        scores = softcap * bend
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
    if causal:
        positions = torch.arange(key.shape[2], device=key.device)
        scores.masked_fill_(positions > rows[:, None, :, None], -torch.inf)
    # a fully masked row has logsumexp -inf (or +inf, as some kernels write it): its probabilities are zero
    finite = torch.where(torch.isfinite(logsumexp), logsumexp, torch.inf)
    weights = scores.sub_(finite[..., None]).exp_()
    delta = (grad.to(weights.dtype) * out.to(weights.dtype)).sum(-1, keepdim=True)
    slope = _product(grad, value.transpose(-2, -1)).to(weights.dtype).sub_(delta)
    weights = weights.to(query.dtype)
    slope *= weights
    if bend is not None:
        slope *= 1.0 - bend * bend
    return weights, slope.to(query.dtype)


def _grouped(tensor: Tensor, kv_heads: int) -> Tensor:
    """The rows of all query heads that share a key head, one after the other: [B, kv_heads, group * K, ...]."""
    batch, heads, slots, width = tensor.shape
    return tensor.reshape(batch, kv_heads, heads // kv_heads * slots, width)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Of [B, heads, K, m] and [B, kv_heads, m, n], whose heads several of the left share."""
    return torch.matmul(_grouped(left, right.shape[1]), right).view(*left.shape[:3], right.shape[3])


def _summed(left: Tensor, right: Tensor, kv_heads: int) -> Tensor:
    """left^T right over the queries, and over the heads that share a key head."""
    return torch.matmul(_grouped(left, kv_heads).transpose(-2, -1), _grouped(right, kv_heads))


def _at_keys(scores: Tensor, rows: Tensor) -> Tensor:
    """The columns [B, heads, K, S] of the keys at ``rows``."""
    return scores.gather(3, rows[:, None, None, :].expand(-1, *scores.shape[1:3], -1))


def _fake(
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
    length = key.shape[2] if all_keys else rows.shape[1]
    dk = key.new_empty(key.shape[0], key.shape[1], length, key.shape[3])
    dv = value.new_empty(value.shape[0], value.shape[1], length, value.shape[3])
    return query.new_empty(query.shape), dk, dv


def fits_kernel(
    device: torch.device, dtype: torch.dtype, query: Sequence[int], key: Sequence[int], value: Sequence[int]
) -> bool:
    """Whether the Triton kernels can do it; the arguments are the shapes' and the query's."""
    return (
        device.type == "cuda"
        and runs_our_kernels()
        and dtype in (torch.bfloat16, torch.float16, torch.float32)
        and query[3] <= 256
        and tuple(key) == tuple(value)
        and query[3] == key[3]
        and 0 not in query
    )


def _attention_rows_backward_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, query, key, value, *_ = arguments
    if not fits_kernel(query.device, query.dtype, query.shape, key.shape, value.shape):
        return attention_rows_backward_reference(*arguments)
    from cggr_compile.kernels.attention_rows import attention_rows_backward_triton

    return attention_rows_backward_triton(*arguments)


attention_rows_backward = define_opaque(
    "attention_rows_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp,"
    " Tensor rows, Tensor? mask, float scale, bool causal, bool all_keys,"
    " float softcap=0.0) -> (Tensor, Tensor, Tensor)",
    attention_rows_backward_reference,
    _fake,
)
LIBRARY.impl("attention_rows_backward", attention_rows_backward_cpu, "CPU")
# importing Triton waits for the first call on a device
LIBRARY.impl("attention_rows_backward", _attention_rows_backward_cuda, "CUDA")
