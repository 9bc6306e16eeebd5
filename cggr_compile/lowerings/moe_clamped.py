"""The lowering of ``cggr::moe_clamped_mlp`` and its backward: their products as those of ``moe_mlp`` (``moe.py``)."""

from __future__ import annotations

from typing import Any

from cggr_compile import compat
from cggr_compile.lowerings.moe import GroupedProducts, serves
from cggr_compile.ops.moe_clamped import moe_clamped_mlp, moe_clamped_mlp_backward
from cggr_compile.ops.moe_clamped_steps import (
    moe_bias_gradient,
    moe_biased_routing_gradient,
    moe_clamped_activation,
    moe_clamped_activation_backward,
)
from cggr_compile.ops.moe_steps import moe_combine


def lower_moe_clamped_mlp(
    hidden: Any,
    gate_up: Any,
    gate_up_bias: Any,
    down: Any,
    down_bias: Any,
    weights: Any,
    order: Any,
    position: Any,
    offsets: Any,
    alpha: float,
    limit: float,
    save: bool,
) -> Any:
    """Inductor's nodes for the operator's arguments, in, and for its results, out."""
    if not serves(hidden, gate_up, down):
        matrices = (gate_up, gate_up_bias, down, down_bias)
        rest = (weights, order, position, offsets, alpha, limit, save)
        return compat.call_operator(moe_clamped_mlp, hidden, *matrices, *rest)
    grouped = GroupedProducts(hidden, order, offsets, int(weights.get_size()[1]))
    both, width = int(gate_up.get_size()[1]), int(down.get_size()[1])
    inner = grouped.rows_of("inner", hidden, gate_up, both, bias=gate_up_bias)
    activation = compat.call_operator(moe_clamped_activation, inner, offsets, alpha, limit)
    products = grouped.rows_of("biased_down", activation, down, width, bias=down_bias)
    out = compat.call_operator(moe_combine, products, weights, position, offsets, grouped.top_k)
    return out, inner if save else grouped.empty(0, both)


def lower_moe_clamped_mlp_backward(
    grad: Any,
    hidden: Any,
    gate_up: Any,
    gate_up_bias: Any,
    down: Any,
    down_bias: Any,
    weights: Any,
    inner: Any,
    order: Any,
    position: Any,
    offsets: Any,
    alpha: float,
    limit: float,
) -> Any:
    """As :func:`lower_moe_clamped_mlp`."""
    if not serves(hidden, gate_up, down):
        matrices = (gate_up, gate_up_bias, down, down_bias)
        rest = (weights, inner, order, position, offsets, alpha, limit)
        return compat.call_operator(moe_clamped_mlp_backward, grad, hidden, *matrices, *rest)
    grouped = GroupedProducts(hidden, order, offsets, int(weights.get_size()[1]))
    d_activation = grouped.rows_of("d_activation", grad, down, int(down.get_size()[2]))
    backward = (d_activation, inner, weights, order, offsets, alpha, limit)
    weighted, d_inner, by_row = compat.call_operator(moe_clamped_activation_backward, *backward)
    d_rows = grouped.rows_of("d_hidden", d_inner, gate_up, int(gate_up.get_size()[2]))
    d_gate_up = _matrix_gradient(grouped, gate_up, d_inner, hidden, tokens_first=False)
    d_down = _matrix_gradient(grouped, down, weighted, grad, tokens_first=True)
    permuted = (order, offsets, grouped.top_k)
    d_gate_up_bias = compat.call_operator(moe_bias_gradient, gate_up_bias, d_inner, None, *permuted)
    d_down_bias = compat.call_operator(moe_bias_gradient, down_bias, grad, weights, *permuted)
    d_hidden = compat.call_operator(moe_combine, d_rows, None, position, offsets, grouped.top_k)
    d_weights = compat.call_operator(moe_biased_routing_gradient, by_row, grad, down_bias, position, offsets, weights)
    return d_hidden, d_gate_up, d_gate_up_bias, d_down, d_down_bias, d_weights


def _matrix_gradient(grouped: GroupedProducts, matrices: Any, by_row: Any, by_token: Any, *, tokens_first: bool) -> Any:
    """The gradient of ``matrices`` [E, M, N], stored as they are; M belongs to ``by_token`` if ``tokens_first``."""
    strides = compat.static_strides(compat.realize_fixed_layout(matrices))
    transposed = strides[2] != 1 and strides[1] == 1
    kernel = "d_down" if tokens_first != transposed else "d_gate_up"
    found = grouped.weight_gradient(kernel, by_row, by_token)
    return compat.transposed_matrices(found) if transposed else found
