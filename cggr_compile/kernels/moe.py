"""``cggr::moe_mlp`` and its backward as sequences of Triton kernels; see ``moe_products`` for the grouped products

Forward: rows gathered, multiplied and gated in one kernel; multiplied again; then every token sums its rows, each
times its routing weight. Nothing is added atomically: the same input gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cggr_compile.kernels.common import contiguous_rows
from cggr_compile.kernels.moe_gather import gather_rows
from cggr_compile.kernels.moe_products import configuration_of, multiply_rows
from cggr_compile.kernels.moe_weight_gradient import weight_gradient
from cggr_compile.kernels.routing_gradient import routing_gradient


@triton.jit
def _combine_kernel(
    rows_ptr, weights_ptr, position_ptr, routed_ptr, out_ptr, H,
    WEIGHTED: tl.constexpr, TOP_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    routed = tl.load(routed_ptr)
    total = tl.zeros([BLOCK_H], tl.float32)
    for slot in tl.static_range(TOP_K):
        row = tl.load(position_ptr + token * TOP_K + slot)
        # rows without an expert were never written
        term = tl.load(rows_ptr + row.to(tl.int64) * H + column, mask=(column < H) & (row < routed), other=0.0)
        term = term.to(tl.float32)
        if WEIGHTED:
            term *= tl.load(weights_ptr + token * TOP_K + slot).to(tl.float32)
        total += term
    tl.store(out_ptr + token * H + column, total, mask=column < H)


def combine(rows: Tensor, weights: Tensor | None, position: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    """[tokens, H]: every token's sum over its rows of ``rows`` [tokens * top_k, H], times ``weights`` if given."""
    weights = None if weights is None else weights.contiguous()
    width = rows.shape[1]
    out = rows.new_empty(rows.shape[0] // top_k, width)
    block = min(triton.next_power_of_2(width), 2048)
    _combine_kernel[(out.shape[0], triton.cdiv(width, block))](
        *(rows, weights, position, offsets[-1:], out, width),
        WEIGHTED=weights is not None,
        TOP_K=top_k,
        BLOCK_H=block,
    )
    return out


def moe_mlp_triton(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
    save: bool,
    overrides: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> tuple[Tensor, Tensor]:
    """As the reference. ``overrides``: of ``multiply_rows``, by kernel."""
    rows, top_k, width = order.shape[0], weights.shape[1], down.shape[2]
    inner = hidden.new_empty(rows if save else 0, 2 * width)
    if not rows:
        return torch.zeros_like(hidden), inner
    activation, products = hidden.new_empty(rows, width), hidden.new_empty(rows, hidden.shape[1])
    shared: dict[str, Any] = dict(order=order, top_k=top_k, queues={})
    with torch.cuda.device_of(hidden):
        saved = inner if save else None
        multiply_rows(
            "swiglu", hidden, gate_up, activation, offsets, inner=saved, **shared, **overrides.get("swiglu", {})
        )
        multiply_rows("down", activation, down, products, offsets, **shared, **overrides.get("down", {}))
        return combine(products, weights, position, offsets, top_k), inner


def moe_mlp_backward_triton(
    grad: Tensor,
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    inner: Tensor,
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
    overrides: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference. ``overrides``: of ``multiply_rows`` and ``weight_gradient``, by kernel."""
    rows, top_k, width = order.shape[0], weights.shape[1], down.shape[2]
    if not rows:
        return torch.zeros_like(hidden), torch.zeros_like(gate_up), torch.zeros_like(down), torch.zeros_like(weights)
    weighted, d_inner = inner.new_empty(rows, width), torch.empty_like(inner)
    permuted = (order, offsets, top_k)
    shared: dict[str, Any] = dict(order=order, top_k=top_k, queues={})
    with torch.cuda.device_of(hidden):
        of = overrides.get("swiglu_backward", {})
        gathered = not {**configuration_of("swiglu_backward", down, width), **of}.get("GATHER", True)
        if gathered:  # once for both who read them
            grad = gather_rows(contiguous_rows(grad), order, top_k)
        parts = multiply_rows(
            "swiglu_backward",
            grad,
            down,
            weighted,
            offsets,
            inner=inner,
            d_inner=d_inner,
            weights=weights.contiguous(),
            gathered=gathered,
            **shared,
            **of,
        )
        d_down = weight_gradient("d_down", grad, weighted, *permuted, gathered, **overrides.get("d_down", {}))
        del grad, weighted
        d_rows = hidden.new_empty(rows, hidden.shape[1])
        multiply_rows("d_hidden", d_inner, gate_up, d_rows, offsets, **shared, **overrides.get("d_hidden", {}))
        d_hidden = combine(d_rows, None, position, offsets, top_k)
        del d_rows
        d_gate_up = weight_gradient("d_gate_up", d_inner, hidden, *permuted, **overrides.get("d_gate_up", {}))
    assert parts is not None
    return d_hidden, d_gate_up, d_down, routing_gradient(parts, position, offsets, weights)
