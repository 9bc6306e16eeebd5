"""The backward of Mixture-of-Experts layers from the selected tokens' (token, expert) pairs only."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.base import shape_of
from cggr_compile.passes.row_sparse.values import Rows, RowValues

aten = torch.ops.aten
ops = torch.ops.cggr


# how many matrices and biases they take, and how many numbers at the end
_BACKWARDS: dict[Any, tuple[int, int]] = {
    ops.moe_mlp_backward.default: (2, 0),
    ops.moe_clamped_mlp_backward.default: (4, 2),
}


def experts(rv: RowValues, node: Node) -> bool:
    """Replace a ``moe_mlp_backward`` whose output gradient is sparse (``moe_clamped_mlp_backward`` likewise).

    False for any other call. The selected tokens are sorted by expert anew, and what gate and up gave is gathered for
    their pairs::

        dx, dW1, dW2, dw = moe_mlp_backward(scatter(g), x, W1, W2, w, inner, *moe_permute(chosen, E))

    becomes::

        permuted = moe_permute(chosen[rows], E)
        dx_rows, dW1, dW2, dw_rows = moe_mlp_backward(g, x[rows], W1, W2, w[rows], inner[pairs], *permuted)
    """
    if node.target not in _BACKWARDS:
        return False
    count, numbers = _BACKWARDS[node.target]
    tensors, last = node.args[: len(node.args) - numbers], node.args[len(node.args) - numbers :]
    grad, hidden, *matrices, weights, inner, order, position, _ = (_node(value) for value in tensors)
    permute = order.args[0] if order.target is operator.getitem else None
    known = isinstance(permute, Node) and permute.target is ops.moe_permute.default
    if grad not in rv.sparse or rv.sparse[grad].layout != ("BS", None) or not known:
        return False
    assert isinstance(permute, Node)
    chosen, num_experts = permute.args
    layout, top_k, call = rv.sparse[grad].layout, shape_of(weights)[1], rv.emit.call
    permuted = call(ops.moe_permute.default, rv.version(_node(chosen), layout), num_experts)
    among_rows = rv.emit.item(permuted, 0)
    token = call(aten.div.Tensor_mode, among_rows, top_k, rounding_mode="floor")
    pair = call(aten.add.Tensor, call(aten.mul.Tensor, call(aten.index.Tensor, rv.flat_rows(inner), [token]), top_k),
                call(aten.remainder.Scalar, among_rows, top_k))  # fmt: skip
    found = call(
        node.target,
        rv.sparse[grad].values,
        rv.version(hidden, layout),
        *matrices,
        rv.version(weights, layout),
        call(aten.index.Tensor, inner, [call(aten.index.Tensor, position, [pair])]),
        *(rv.emit.item(permuted, i) for i in range(3)),
        *last,
    )
    for getter in node.users:
        index = int(getter.args[1])  # type: ignore[arg-type]
        value = rv.emit.item(found, index)
        if index in (0, 1 + count):  # of the tokens, of their routing weights
            rv.sparse[getter] = Rows(value, layout)
        else:
            getter.replace_all_uses_with(value)
    return True


def _node(value: Any) -> Node:
    assert isinstance(value, Node)
    return value
