"""Attention backwards, in every form that AOTAutograd emits, from the selected queries only."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.base import shape_of
from cggr_compile.passes.row_sparse import flex
from cggr_compile.passes.row_sparse.layout import Layout
from cggr_compile.passes.row_sparse.values import Rows, RowValues, ends_at_markers

aten = torch.ops.aten

FORMS = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    aten._scaled_dot_product_flash_attention_backward.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
    aten._scaled_dot_product_cudnn_attention_backward.default,
}
CASTS = (torch.ops.prims.convert_element_type.default, aten._to_copy.default)
FORWARDS = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


@dataclass(frozen=True)
class Call:
    """The arguments that all forms share; ``logsumexp`` and ``mask`` at the selected queries."""

    grad: Node
    query: Node
    key: Node
    value: Node
    out: Node
    logsumexp: Node
    mask: Node | None
    causal: bool
    scale: float


def _read(rv: RowValues, node: Node, heads: Layout, items: Collection[int]) -> Call | str:
    """The call's arguments, found by the names in its schema: their order differs between forms and releases.

    Or why there is no backward on rows.
    """
    target: Any = node.target
    parameters = target._schema.arguments
    given: dict[str, Any] = {p.name: p.default_value for p in parameters}
    given |= dict(zip((p.name for p in parameters), node.args, strict=False)) | node.kwargs
    query: Any = given["query"]
    scale, key = given["scale"], given["key"]
    if given["dropout_p"]:
        return f"attention dropout {given['dropout_p']:g}"
    if 3 in items:
        return "an attention mask with a gradient"
    mask = given.get("attn_mask", given.get("attn_bias"))
    if mask is not None:
        lead = [1] * (4 - len(shape_of(mask)))
        mask = rv.emit.call(aten.view.default, mask, [*lead, *shape_of(mask)]) if lead else mask
        mask = rv.operand(mask, heads, (*shape_of(query)[:3], shape_of(key)[2]))
        assert mask is not None  # four axes line up with the scores
    statistics = given["logsumexp"]  # [B, heads, >= S] or [B, heads, S, 1]
    if len(shape_of(statistics)) == 4:
        statistics = rv.emit.call(aten.squeeze.dim, statistics, 3)
    return Call(
        node.args[0],  # type: ignore[arg-type]  # named grad_out or grad_out_
        *(query, key, given["value"], given["out"]),
        logsumexp=rv.gather(statistics, heads[:3]),
        mask=mask,
        causal=given["is_causal"],
        scale=1.0 / math.sqrt(shape_of(query)[-1]) if scale is None else scale,
    )


def _read_flex(rv: RowValues, node: Node, heads: Layout) -> Call | str:
    if why := flex.obstacle(node):
        return why
    given = flex.arguments(node)
    return Call(
        *(given["grad"], given["query"], given["key"], given["value"], given["out"]),
        logsumexp=flex.logsumexp(rv, node, heads),
        mask=flex.mask(rv, node),
        causal=False,
        scale=given["scale"],
    )


def attention(rv: RowValues, node: Node) -> bool:
    """Replace an attention backward whose output gradient is sparse; False for any other call.

    Where a form is not handled its backward stays dense, under a name in the report; the gradient of the queries
    is on rows all the same: without an output gradient a query has none.
    """
    is_flex = str(node.target) == flex.BACKWARD
    if node.target not in FORMS and not is_flex:
        return False
    grad: Any = flex.arguments(node)["grad"] if is_flex else node.args[0]
    if grad not in rv.sparse:
        return False
    heads = rv.layout("B", None, "S", None)
    known = rv.sparse[grad].layout == heads
    items = _items(node)
    only_rows = all(ends_at_markers(getter, CASTS) for i in (1, 2) for getter in items.get(i, []))
    call: Call | str
    if not known:
        call = f"an output gradient laid out as {rv.sparse[grad].layout}"
    else:
        call = _read_flex(rv, node, heads) if is_flex else _read(rv, node, heads, items)
    if isinstance(call, str):
        rv.dense_attention[call] += 1
        # FlexAttention may have two of them: its log-sum-exp's as well
        dense = rv.graph.node_copy(node, lambda n: rv.dense(n) if n in rv.sparse else n)
        for index, getters in items.items():
            value = rv.emit.item(dense, index)
            for getter in getters:
                if index == 0 and known:
                    rv.sparse[getter] = Rows(rv.version(value, heads), heads)
                else:
                    getter.replace_all_uses_with(value)
        return True
    found = _on_rows(rv, call, heads, only_rows)
    for index, getters in items.items():
        value = rv.emit.item(found, index)
        for getter in getters:
            if index == 0:
                rv.sparse[getter] = Rows(value, heads)
            elif only_rows:
                # keys at unused slots take no part
                rv.sparse[getter] = Rows(rv.kept(value, heads), heads)
            else:
                getter.replace_all_uses_with(rv.strided_like(value, getter))
    return True


def _on_rows(rv: RowValues, call: Call, heads: Layout, only_rows: bool) -> Node:
    """The backward from the selected queries."""
    return rv.emit.call(
        torch.ops.cggr.attention_rows_backward.default,
        rv.sparse[call.grad].values,
        rv.version(call.query, heads),
        call.key,
        call.value,
        rv.version(call.out, heads),
        call.logsumexp,
        rv.rows,
        call.mask,
        call.scale,
        call.causal,
        not only_rows,
    )


def _items(node: Node) -> dict[int, list[Node]]:
    found: dict[int, list[Node]] = {}
    for user in node.users:
        assert user.target is operator.getitem
        if user.users:
            found.setdefault(int(user.args[1]), []).append(user)  # type: ignore[arg-type]
    return found
