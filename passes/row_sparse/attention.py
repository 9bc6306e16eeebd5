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
from cggr_compile.passes.row_sparse import flash, flex
from cggr_compile.passes.row_sparse.layout import Layout
from cggr_compile.passes.row_sparse.values import Rows, RowValues, ends_at_markers

aten = torch.ops.aten

FORMS = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    aten._scaled_dot_product_flash_attention_backward.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
    aten._scaled_dot_product_cudnn_attention_backward.default,
}
CASTS = (torch.ops.prims.convert_element_type.default, aten._to_copy.default, aten.alias.default)
FORWARDS = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


def is_forward(node: Node) -> bool:
    return node.target in FORWARDS or str(node.target) in flash.FORWARDS


@dataclass(frozen=True)
class Call:
    """The arguments that all forms share; ``logsumexp`` and ``mask`` at the selected queries."""

    query: Node
    key: Node
    value: Node
    out: Node
    logsumexp: Node
    mask: Node | None
    causal: bool
    scale: float
    softcap: float = 0.0


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
        *(given["query"], given["key"], given["value"], given["out"]),
        logsumexp=flex.logsumexp(rv, node, heads),
        mask=flex.mask(rv, node),
        causal=False,
        scale=given["scale"],
    )


def _read_flash(rv: RowValues, node: Node, heads: Layout) -> Call | str:
    if why := flash.obstacle(rv, node):
        return why
    given: Any = node.kwargs
    mask, causal = flash.mask(rv, node)
    query, key, value, out = (flash.by_heads(rv, node, given[name]) for name in ("q", "k", "v", "out"))
    return Call(
        *(query, key, value, out),
        logsumexp=flash.logsumexp(rv, node, heads),
        mask=mask,
        causal=causal,
        scale=given["softmax_scale"],
        softcap=given["softcap"],
    )


def attention(rv: RowValues, node: Node) -> bool:
    """Replace an attention backward whose output gradient is sparse; False for any other call.

    Where a form is not handled its backward stays dense, under a name in the report; the gradient of the queries
    is on rows all the same: without an output gradient a query has none.
    """
    is_flex, is_flash = str(node.target) == flex.BACKWARD, flash.is_backward(node)
    if node.target not in FORMS and not is_flex and not is_flash:
        return False
    places = flash.places(node) if is_flash else {i: i for i in range(4)}
    items = _items(node)
    if places is None or not items.keys() <= places.keys():
        return False
    grad: Any = node.args[0]  # named grad_out or grad_out_
    if is_flex or is_flash:
        grad = flex.arguments(node)["grad"] if is_flex else node.kwargs["dout"]
    if grad not in rv.sparse:
        return False
    heads = rv.layout("B", None, "S", None)
    layout = flash.layout(rv, node) if is_flash else heads
    known = rv.sparse[grad].layout == layout
    only_rows = all(ends_at_markers(g, CASTS) for i, found in items.items() if places.get(i) in (1, 2) for g in found)
    call: Call | str
    if not known:
        call = f"an output gradient laid out as {rv.sparse[grad].layout}"
    elif is_flash:
        call = _read_flash(rv, node, heads)
    else:
        call = _read_flex(rv, node, heads) if is_flex else _read(rv, node, heads, items)
    if isinstance(call, str):
        rv.dense_attention[call] += 1
        # FlexAttention may have two of them: its log-sum-exp's as well
        dense = rv.graph.node_copy(node, lambda n: rv.dense(n) if n in rv.sparse else n)
        for index, getters in items.items():
            value = rv.emit.item(dense, index)
            for getter in getters:
                if places.get(index) == 0 and known:
                    rv.sparse[getter] = Rows(rv.version(value, layout), layout)
                else:
                    getter.replace_all_uses_with(value)
        return True
    values = rv.sparse[grad].values
    found = _on_rows(rv, call, flash.by_heads(rv, node, values) if is_flash else values, heads, only_rows)
    for index, getters in items.items():
        value = rv.emit.item(found, places[index])
        rows = value if places[index] == 0 or not only_rows else rv.kept(value, heads)  # unused slots take no part
        rows = flash.by_tokens(rv, node, rows) if is_flash else rows
        for getter in getters:
            if places[index] == 0 or only_rows:
                rv.sparse[getter] = Rows(rows, layout)
            else:
                getter.replace_all_uses_with(rv.strided_like(rows, getter))
    return True


def _on_rows(rv: RowValues, call: Call, grad: Node, heads: Layout, only_rows: bool) -> Node:
    """The backward from the selected queries, whose output gradient is ``grad``."""
    return rv.emit.call(
        torch.ops.cggr.attention_rows_backward.default,
        grad,
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
        call.softcap,
    )


def _items(node: Node) -> dict[int, list[Node]]:
    found: dict[int, list[Node]] = {}
    for user in node.users:
        assert user.target is operator.getitem
        if user.users:
            found.setdefault(int(user.args[1]), []).append(user)  # type: ignore[arg-type]
    return found
