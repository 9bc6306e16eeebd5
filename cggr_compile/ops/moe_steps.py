"""The steps of ``cggr::moe_mlp`` as operators, for a lowering that chooses how each of them is computed.

Nothing else calls them: where nothing is chosen, ``moe_mlp`` stays one operator. With ``library`` a grouped product is
left to ``F.grouped_mm``, with a gather before it or SwiGLU after it as that takes; without, it is that of our kernels.
On the CPU there is only the library.

Rows are in the order of their experts, tokens * top_k of them; what results hold for rows without an expert (from
``offsets[-1]`` on) is unspecified. ``moe_permute`` explains order, position, offsets, ``moe_mlp_reference`` the rest.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cggr_compile.kernels.routing_gradient import routing_gradient
from cggr_compile.ops.library import define_opaque

TILE_ROWS, TILE_COLUMNS = 128, 128  # of the tiles that a schedule, and the parts of a sum, are made for


def _schedule(offsets: Tensor, rows: int) -> Tensor:
    """The queue of row tiles, int32: their number, then expert and first row of each."""
    if offsets.is_cuda:
        from cggr_compile.kernels.moe_products import schedule

        with torch.cuda.device_of(offsets):
            return schedule(offsets, rows, TILE_ROWS)
    bounds = enumerate(itertools.pairwise(offsets.tolist()))
    tiles = [(expert, row) for expert, (start, end) in bounds for row in range(start, end, TILE_ROWS)]
    queue = _fake_schedule(offsets, rows).fill_(0)
    queue[0] = len(tiles)
    queue[1 : 1 + 2 * len(tiles)] = torch.tensor(tiles, dtype=queue.dtype).view(-1)
    return queue


def _fake_schedule(offsets: Tensor, rows: int) -> Tensor:
    return offsets.new_empty(1 + 2 * (rows // TILE_ROWS + offsets.shape[0] - 1))


def _swiglu(
    hidden: Tensor, gate_up: Tensor, order: Tensor, offsets: Tensor, inner: Tensor | None, top_k: int, library: bool
) -> Tensor:
    """silu(gate) * up, [rows, I]; ``inner`` [rows, 2 * I], if given, gets gate and up."""
    out = _fake_swiglu(hidden, gate_up, order)
    with torch.cuda.device_of(hidden):
        if hidden.is_cuda and not library:
            from cggr_compile.kernels.moe_products import multiply_rows

            multiply_rows("swiglu", hidden, gate_up, out, offsets, queues={}, order=order, top_k=top_k, inner=inner)
            return out
        both = F.grouped_mm(hidden[order // top_k], gate_up.mT, offs=offsets[1:])
        if inner is not None:
            both = inner.copy_(both)
        if hidden.is_cuda:
            from cggr_compile.kernels.moe_gate import gate_triton

            gate_triton(both, out, offsets)
            return out
        gate, up = both.float().chunk(2, -1)
        return out.copy_(F.silu(gate) * up)


def _fake_swiglu(hidden: Tensor, gate_up: Tensor, order: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(order.shape[0], gate_up.shape[1] // 2)


def _swiglu_backward(
    grad: Tensor,
    down: Tensor,
    order: Tensor,
    offsets: Tensor,
    inner: Tensor,
    weights: Tensor,
    d_inner: Tensor,
    weighted: Tensor,
    top_k: int,
    library: bool,
) -> Tensor:
    """From ``grad`` [tokens, H] back to gate and up.

    ``d_inner`` [rows, 2 * I] gets their gradient, ``weighted`` [rows, I] the activation times its routing weight.

    Returns:
        float32 [column tiles, rows], whose sum over the tiles is the gradient of a row's routing weight.
    """
    parts = _fake_swiglu_backward(grad, down, order)
    with torch.cuda.device_of(grad):
        if grad.is_cuda and not library:
            from cggr_compile.kernels.moe_products import multiply_rows

            found = multiply_rows(
                "swiglu_backward",
                grad,
                down,
                weighted,
                offsets,
                queues={},
                order=order,
                top_k=top_k,
                inner=inner,
                d_inner=d_inner,
                weights=weights.contiguous(),
                BLOCK_N=TILE_COLUMNS,
            )
            assert found is not None
            return found
        d_activation = F.grouped_mm(grad[order // top_k], down, offs=offsets[1:])
        if grad.is_cuda:
            from cggr_compile.kernels.moe_gate import gate_backward_triton

            gate_backward_triton(d_activation, inner, weights.contiguous(), order, offsets, weighted, d_inner, parts)
            return parts
        product, weight = d_activation.float(), weights.reshape(-1).float()[order.long()][:, None]
        gate, up = inner.float().chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        weighted.copy_(silu * up * weight)
        d_gate = product * weight * up * sigmoid * (1 + gate - silu)
        d_inner.copy_(torch.cat([d_gate, product * weight * silu], 1))
        parts.zero_()
        parts[0] = (product * silu * up).sum(1)
        return parts


def _fake_swiglu_backward(grad: Tensor, down: Tensor, order: Tensor, *_: Any) -> Tensor:
    return grad.new_empty(-(-down.shape[2] // TILE_COLUMNS), order.shape[0], dtype=torch.float32)


def _product(rows: Tensor, matrices: Tensor, offsets: Tensor, transposed: bool, library: bool) -> Tensor:
    """[rows, N]: every row of ``rows`` [rows, K] times its expert's matrix, [K, N], or [N, K] if ``transposed``."""
    if rows.is_cuda and not library:
        from cggr_compile.kernels.moe_products import multiply_rows

        out = _fake_product(rows, matrices, offsets, transposed)
        with torch.cuda.device_of(rows):
            multiply_rows("down" if transposed else "d_hidden", rows, matrices, out, offsets, queues={})
        return out
    return F.grouped_mm(rows, matrices.mT if transposed else matrices, offs=offsets[1:])


def _fake_product(rows: Tensor, matrices: Tensor, offsets: Tensor, transposed: bool, *_: Any) -> Tensor:
    return rows.new_empty(rows.shape[0], matrices.shape[1 if transposed else 2])


def _weight_gradient(
    by_row: Tensor, by_token: Tensor, order: Tensor, offsets: Tensor, top_k: int, tokens_first: bool, library: bool
) -> Tensor:
    """[E, M, N]: an expert's sum over its rows of outer products; M belongs to ``by_token`` if ``tokens_first``."""
    if by_row.is_cuda and not library:
        from cggr_compile.kernels.moe_weight_gradient import weight_gradient

        pair = ("d_down", by_token, by_row) if tokens_first else ("d_gate_up", by_row, by_token)
        with torch.cuda.device_of(by_row):
            return weight_gradient(*pair, order, offsets, top_k)
    of_rows = by_token[order // top_k]
    left, right = (of_rows, by_row) if tokens_first else (by_row, of_rows)
    return F.grouped_mm(left.t(), right, offs=offsets[1:])


def _fake_weight_gradient(
    by_row: Tensor, by_token: Tensor, order: Tensor, offsets: Tensor, top_k: int, tokens_first: bool, *_: Any
) -> Tensor:
    left, right = (by_token, by_row) if tokens_first else (by_row, by_token)
    return by_row.new_empty(offsets.shape[0] - 1, left.shape[1], right.shape[1])


def _combine(rows: Tensor, weights: Tensor | None, position: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    """[tokens, N]: every token's sum over its rows of ``rows``, times ``weights`` [tokens, top_k] if given."""
    if rows.is_cuda:
        from cggr_compile.kernels.moe import combine

        with torch.cuda.device_of(rows):
            return combine(rows, weights, position, offsets, top_k)
    there = (position < offsets[-1])[:, None]
    terms = torch.where(there, rows.float()[position.long()], 0.0).view(-1, top_k, rows.shape[1])
    return (terms if weights is None else terms * weights[..., None].float()).sum(1).to(rows.dtype)


def _fake_combine(rows: Tensor, weights: Tensor | None, position: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    return rows.new_empty(rows.shape[0] // top_k, rows.shape[1])


def _fake_routing_gradient(parts: Tensor, position: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return weights.new_empty(weights.shape)


moe_schedule = define_opaque("moe_schedule(Tensor offsets, int rows) -> Tensor", _schedule, _fake_schedule)
moe_swiglu = define_opaque(
    "moe_swiglu(Tensor hidden, Tensor gate_up, Tensor order, Tensor offsets, Tensor(a!)? inner, int top_k,"
    " bool library) -> Tensor",
    _swiglu,
    _fake_swiglu,
)
moe_swiglu_backward = define_opaque(
    "moe_swiglu_backward(Tensor grad, Tensor down, Tensor order, Tensor offsets, Tensor inner, Tensor weights,"
    " Tensor(a!) d_inner, Tensor(b!) weighted, int top_k, bool library) -> Tensor",
    _swiglu_backward,
    _fake_swiglu_backward,
)
moe_product = define_opaque(
    "moe_product(Tensor rows, Tensor matrices, Tensor offsets, bool transposed, bool library) -> Tensor",
    _product,
    _fake_product,
)
moe_weight_gradient = define_opaque(
    "moe_weight_gradient(Tensor by_row, Tensor by_token, Tensor order, Tensor offsets, int top_k, bool tokens_first,"
    " bool library) -> Tensor",
    _weight_gradient,
    _fake_weight_gradient,
)
moe_combine = define_opaque(
    "moe_combine(Tensor rows, Tensor? weights, Tensor position, Tensor offsets, int top_k) -> Tensor",
    _combine,
    _fake_combine,
)
moe_routing_gradient = define_opaque(
    "moe_routing_gradient(Tensor parts, Tensor position, Tensor offsets, Tensor weights) -> Tensor",
    routing_gradient,
    _fake_routing_gradient,
)
