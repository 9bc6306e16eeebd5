"""Floating-point operations of a call: FlopCounter's formulas, those of our operators among them.

Importing this registers ours, so that ``torch.utils.flop_counter.FlopCounterMode`` counts them too. As FlopCounter's,
they count products only, and of causal attention the whole square.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry, register_flop_formula

from cggr_compile import ops  # noqa: F401  (defines the operators)
from cggr_compile.cost.propagate import ATTENTION, ATTENTION_BACKWARD, Sizes, sizes_of
from cggr_compile.cost.sizes import expression

aten, cggr = torch.ops.aten, torch.ops.cggr
Dims = Sequence[Any]  # integers, or expressions


def attention(query: Dims, key: Dims, value: Dims) -> Any:
    """Two products of every query with every key."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def attention_backward(query: Dims, key: Dims, value: Dims) -> Any:
    """The scores again, and four products for three gradients."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (3 * width + 2 * value[3])


def _attention_rows_backward(
    grad: Dims, query: Dims, key: Dims, value: Dims, out: Any, lse: Any, rows: Any, mask: Any, *rest: Any, **_: Any
) -> Any:
    """Scores and their gradient twice: for the queries, with all keys; for keys and values, of all or of the rows."""
    all_keys = rest[2]
    batch, heads, queries, width = query
    keys = key[2] if all_keys else queries
    pairs = 2 * batch * heads * queries
    return pairs * key[2] * (2 * width + value[3]) + pairs * keys * (2 * width + 2 * value[3])


def _head(hidden: Dims, weight: Dims, *_: Any, **__: Any) -> Any:
    """One product of the hidden states with the vocabulary."""
    return 2 * _numel(hidden[:-1]) * weight[0] * weight[1]


def _head_gradients(hidden: Dims, weight: Dims, *rest: Any, out_shape: Any = None, **_: Any) -> Any:
    """The logits again, in the gradient of each of the two that are wanted one more."""
    wanted = rest[-1]
    return (1 + wanted[0] + wanted[1]) * _head(hidden, weight)


def _experts(hidden: Dims, gate_up: Dims, down: Dims, weights: Dims, *_: Any, **__: Any) -> Any:
    return _grouped(_numel(weights), gate_up) + _grouped(_numel(weights), down)


def _experts_backward(grad: Dims, *rest: Any, **_: Any) -> Any:
    """Of each product the gradients of both operands; the gradient of a routing weight is no product."""
    return 2 * _experts(*rest)


def _clamped(
    hidden: Dims, gate_up: Dims, _bias: Any, down: Dims, _bias_down: Any, weights: Dims, *_: Any, **__: Any
) -> Any:
    return _experts(hidden, gate_up, down, weights)


def _clamped_backward(grad: Dims, *rest: Any, **_: Any) -> Any:
    return 2 * _clamped(*rest)


def _moe_product(rows: Dims, matrices: Dims, *_: Any, **__: Any) -> Any:
    return _grouped(rows[0], matrices)


def _swiglu(hidden: Dims, gate_up: Dims, order: Dims, *_: Any, **__: Any) -> Any:
    return _grouped(order[0], gate_up)


def _swiglu_backward(grad: Dims, down: Dims, order: Dims, *_: Any, **__: Any) -> Any:
    return _grouped(order[0], down)


def _expert_weights(by_row: Dims, by_token: Dims, *_: Any, **__: Any) -> Any:
    return 2 * by_row[0] * by_row[1] * by_token[1]


def _grouped_mm(rows: Dims, matrices: Dims, *_: Any, out_shape: Any = None, **__: Any) -> Any:
    """Rows of several matrices; or, where both are flat, the sums over each one's rows."""
    return _grouped(rows[0], matrices) if len(matrices) == 3 else 2 * rows[0] * rows[1] * matrices[1]


def _grouped(rows: Any, matrices: Dims) -> Any:
    """Each row with one of the matrices."""
    return 2 * rows * matrices[1] * matrices[2]


def _numel(dims: Dims) -> Any:
    return sympy.prod(dims) if any(isinstance(dim, sympy.Expr) for dim in dims) else _product(dims)


def _product(dims: Dims) -> int:
    found = 1
    for dim in dims:
        found *= dim
    return found


_OURS: dict[Any, Callable[..., Any]] = {
    cggr.attention_rows_backward: _attention_rows_backward,
    cggr.score_partials: _head,
    cggr.token_log_probs: _head,
    cggr.head_gradients: _head_gradients,
    cggr.moe_mlp: _experts,
    cggr.moe_mlp_backward: _experts_backward,
    cggr.moe_clamped_mlp: _clamped,
    cggr.moe_clamped_mlp_backward: _clamped_backward,
    cggr.moe_product: _moe_product,
    cggr.moe_swiglu: _swiglu,
    cggr.moe_swiglu_backward: _swiglu_backward,
    cggr.moe_weight_gradient: _expert_weights,
}
for packet, formula in _OURS.items():
    register_flop_formula(packet)(formula)

# what FlopCounter has no formula for, or one that compares sizes
_OTHERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(ATTENTION, lambda query, key, value, *_, **__: attention(query, key, value)),
    **dict.fromkeys(
        ATTENTION_BACKWARD, lambda grad, query, key, value, *_, **__: attention_backward(query, key, value)
    ),
    aten._grouped_mm: _grouped_mm,
}


def flops(node: Node, sizes: Sizes) -> tuple[int, sympy.Expr]:
    """Of one call, as a number and as an expression; where the sizes do not tell the latter, it is the number."""
    packet = getattr(node.target, "overloadpacket", None)
    known = _OTHERS.get(packet) or _OURS.get(packet) or flop_registry.get(packet)
    if known is None:
        return 0, sympy.Integer(0)
    count = int(_call(known, node, lambda one: sizes_of(one.meta["val"])))
    try:
        found = sympy.sympify(_call(known, node, lambda one: tuple(map(expression, sizes.shape(one) or ()))))
    except (AssertionError, TypeError, ValueError):  # a formula that compares sizes
        return count, sympy.Integer(count)
    return count, found


def _call(formula: Callable[..., Any], node: Node, shape: Callable[[Node], tuple[Any, ...]]) -> Any:
    def value(one: Node) -> Any:
        return shape(one) if isinstance(one.meta.get("val"), Tensor) else None

    args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
    if formula in flop_registry.values():
        kwargs = {**kwargs, "out_val": _results(node)}
    return formula(*args, **kwargs)


def _results(node: Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [sizes_of(one) if isinstance(one, Tensor) else None for one in value]
    return sizes_of(value) if isinstance(value, Tensor) else None
