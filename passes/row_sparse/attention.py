"""Attention backwards, in every form that AOTAutograd emits, from the selected queries only."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.base import shape_of
from cggr_compile.passes.row_sparse.layout import Layout, align
from cggr_compile.passes.row_sparse.values import Rows, RowValues

aten = torch.ops.aten
HEADS: Layout = ("B", None, "S", None)


@dataclass(frozen=True)
class Call:
    """The arguments that all forms share; ``logsumexp`` [B, heads, >= S] or [B, heads, S, 1]."""

    grad: Node
    query: Node
    key: Node
    value: Node
    out: Node
    logsumexp: Node
    mask: Node | None
    dropout: float
    causal: bool


def _call(a: Any, mask: Any, dropout: Any, causal: Any, out: int = 4) -> Call:
    return Call(a[0], a[1], a[2], a[3], a[out], a[out + 1], mask, float(dropout), bool(causal))


def _cpu(a: Any, k: Any) -> Call:
    return _call(a, k.get("attn_mask"), a[6], a[7])


def _flash(a: Any, k: Any) -> Call:
    return _call(a, None, a[10], a[11])


def _efficient(a: Any, k: Any) -> Call:
    return _call(a, a[4], a[9], a[11] if len(a) > 11 else k.get("is_causal", False), out=5)


def _cudnn(a: Any, k: Any) -> Call:
    return _call(a, a[8], a[13], a[14])


FORMS: dict[Any, Callable[[Any, Any], Call]] = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _cpu,
    aten._scaled_dot_product_flash_attention_backward.default: _flash,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn,
}


def attention(rv: RowValues, node: Node) -> bool:
    """Replace a dense attention backward whose output gradient is sparse; False if its form is not handled."""
    call = FORMS[node.target](node.args, node.kwargs)
    grad = rv.sparse.get(call.grad)
    same_heads = shape_of(call.key)[1] == shape_of(call.query)[1] and shape_of(call.key)[2] == rv.length
    if grad is None or grad.layout != HEADS or call.dropout or not same_heads or 3 in _items(node):
        return False
    statistics = call.logsumexp
    if len(shape_of(statistics)) == 4:
        statistics = rv.emit.call(aten.squeeze.dim, statistics, 3)
    mask = None
    if call.mask is not None:
        whole = (*shape_of(call.query)[:3], shape_of(call.key)[2])
        layout = align(HEADS, whole, shape_of(call.mask))
        if layout is None or len(layout) != 4:
            return False
        mask = rv.version(call.mask, layout)
    items = _items(node)
    only_rows = all(_is_marker(user) for i in (1, 2) for getter in items.get(i, []) for user in getter.users)
    scale: Any = node.kwargs.get("scale")
    results = rv.emit.call(
        torch.ops.cggr.attention_rows_backward.default,
        grad.values,
        rv.version(call.query, HEADS),
        call.key,
        call.value,
        rv.version(call.out, HEADS),
        rv.gather(statistics, HEADS[:3]),
        rv.rows,
        mask,
        float(scale) if scale is not None else 1.0 / math.sqrt(shape_of(call.query)[-1]),
        bool(call.causal),
        not only_rows,
    )
    for index, getters in items.items():
        value = rv.emit.item(results, index)
        for getter in getters:
            if index == 0:
                rv.sparse[getter] = Rows(value, HEADS)
            elif only_rows:
                # keys at unused slots take no part
                rv.sparse[getter] = Rows(rv.kept(value, HEADS), HEADS)
            else:
                getter.replace_all_uses_with(rv.strided_like(value, getter))
    return True


def _items(node: Node) -> dict[int, list[Node]]:
    found: dict[int, list[Node]] = {}
    for user in node.users:
        assert user.target is operator.getitem
        if user.users:
            found.setdefault(int(user.args[1]), []).append(user)  # type: ignore[arg-type]
    return found


def _is_marker(node: Node) -> bool:
    return bool(node.target is torch.ops.cggr.stop_rows_backward.default and node.args[1] == 2)
