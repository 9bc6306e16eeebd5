"""``cggr::attention_rows_backward``: the backward of attention from the selected queries only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cggr_compile.compat import runs_our_kernels
from cggr_compile.ops.library import LIBRARY, define_opaque


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
    batch, heads, slots, _ = query.shape
    kv_heads = key.shape[1]

    def shared(tensor: Tensor) -> Tensor:
        """The rows of all query heads that share a key head, one after the other: [B, kv_heads, group * K, ...]."""
        return tensor.reshape(batch, kv_heads, heads // kv_heads * slots, tensor.shape[3])

    def product(left: Tensor, right: Tensor) -> Tensor:
        return torch.matmul(shared(left), right).view(batch, heads, slots, right.shape[3])

    scores = product(query, key.transpose(-2, -1)).float() * scale
    bent: Tensor | float = 1.0
    if softcap:
        bend = torch.tanh(scores / softcap)
        scores, bent = softcap * bend, 1.0 - bend * bend
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    if causal:
        positions = torch.arange(key.shape[2], device=key.device)
        scores = scores.masked_fill(positions > rows[:, None, :, None], -torch.inf)
    # a fully masked row has logsumexp -inf (or +inf, as some kernels write it): its probabilities are zero
    weights = torch.exp(scores - logsumexp[..., None])
    weights = torch.where(torch.isfinite(logsumexp)[..., None], weights, 0.0).to(query.dtype)
    delta = (grad.float() * out.float()).sum(-1, keepdim=True)
    slope = (weights.float() * (product(grad, value.transpose(-2, -1)).float() - delta) * bent).to(query.dtype)
    dq = product(slope, key) * scale
    if not all_keys:
        columns = rows[:, None, None, :].expand(-1, heads, slots, -1)
        slope, weights = slope.gather(3, columns), weights.gather(3, columns)
    dk = torch.matmul(shared(slope).transpose(-2, -1), shared(query)) * scale
    dv = torch.matmul(shared(weights).transpose(-2, -1), shared(grad))
    return dq, dk, dv


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
# importing Triton waits for the first call on a device
LIBRARY.impl("attention_rows_backward", _attention_rows_backward_cuda, "CUDA")
