"""The backward of attention, by whatever operator, from the selected queries only."""

from __future__ import annotations

import torch
from torch.fx import Node

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.patterns.attention import find_backward
from cggr_compile.passes.patterns.attention.base import BY_HEADS, KEY, QUERY, VALUE, Arguments
from cggr_compile.passes.row_sparse.layout import Layout
from cggr_compile.passes.row_sparse.values import Rows, RowValues, ends_at_markers

aten = torch.ops.aten

CASTS = (torch.ops.prims.convert_element_type.default, aten._to_copy.default, aten.alias.default)


def attention(rv: RowValues, node: Node) -> bool:
    """Replace an attention backward whose output gradient is sparse; False for any other call.

    Where its operator has an obstacle the backward stays dense, under a name in the report; the gradient of the queries
    is on rows all the same: without an output gradient a query has none.
    """
    call = find_backward(node)
    if call is None:
        return False
    getters = call.getters()
    if call.grad not in rv.sparse or not getters.keys() <= call.gradients.keys():
        return False
    heads, layout = rv.layout(*BY_HEADS), rv.layout(*call.axes)
    known = rv.sparse[call.grad].layout == layout
    if not known:
        why: str | None = f"an output gradient laid out as {rv.sparse[call.grad].layout}"
    else:
        why = call.obstacle(rv.batch)
    if why is not None:
        rv.dense_attention[why] += 1
        # there may be two sparse ones: FlexAttention's log-sum-exp has a gradient as well
        dense = rv.graph.node_copy(node, lambda n: rv.dense(n) if n in rv.sparse else n)
        for index, users in getters.items():
            value = rv.emit.item(dense, index)
            for getter in users:
                if call.gradients[index] == QUERY and known:
                    rv.sparse[getter] = Rows(rv.version(value, layout), layout)
                else:
                    getter.replace_all_uses_with(value)
        return True
    only_rows = all(ends_at_markers(g, CASTS) for g in call.uses_of(KEY, VALUE))
    arguments, values = call.arguments(rv, heads), rv.sparse[call.grad].values
    made = _on_rows(rv, arguments, call.to_heads(rv, values), heads, only_rows)
    for index, users in getters.items():
        which = call.gradients[index]
        value = rv.emit.item(made, which)
        rows = value if which == QUERY or not only_rows else rv.kept(value, heads)  # unused slots take no part
        rows = call.from_heads(rv, rows)
        for getter in users:
            if which == QUERY or only_rows:
                rv.sparse[getter] = Rows(rows, layout)
            else:
                getter.replace_all_uses_with(rv.strided_like(rows, getter))
    return True


def _on_rows(rv: RowValues, arguments: Arguments, grad: Node, heads: Layout, only_rows: bool) -> Node:
    """The backward from the selected queries, whose output gradient is ``grad``."""
    return rv.emit.call(
        torch.ops.cggr.attention_rows_backward.default,
        grad,
        rv.version(arguments.query, heads),
        arguments.key,
        arguments.value,
        rv.version(arguments.out, heads),
        arguments.logsumexp,
        rv.rows,
        arguments.mask,
        arguments.scale,
        arguments.causal,
        not only_rows,
        arguments.softcap,
    )
