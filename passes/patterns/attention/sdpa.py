"""``scaled_dot_product_attention``, whose backward is a different ATen operator on every device and backend."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from cggr_compile import compat
from cggr_compile.passes.facts import Attention
from cggr_compile.passes.nodes import argument, op_name, shape_of
from cggr_compile.passes.patterns.attention.base import MASK, Arguments, AttentionAdapter, Backward, Forward, Hides
from cggr_compile.passes.patterns.attention.dense_mask import DenseMasks

if TYPE_CHECKING:
    from cggr_compile.passes.joint.row_sparse.layout import Layout
    from cggr_compile.passes.joint.row_sparse.values import RowValues

aten = torch.ops.aten

FORWARDS = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
BACKWARDS = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    aten._scaled_dot_product_flash_attention_backward.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
    aten._scaled_dot_product_cudnn_attention_backward.default,
}


class ScaledDotProduct(AttentionAdapter):
    """Attention over [..., heads, S, D]. Its mathematical form (dropout on the CPU) is ordinary operators by then."""

    kind = "sdpa"

    def recognise(self, node: Node, stream: Collection[Node]) -> Forward | None:
        if op_name(node) != "scaled_dot_product_attention":
            return None
        query, key, value = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
        return Forward(query, key, value, -2, -2, node, node, argument(node, 3, "attn_mask"))

    def hides(self, attention: Attention, stream: Collection[Node]) -> Hides | None:
        if attention.mask is None:
            return None
        return DenseMasks((attention.mask,), (False,), len(shape_of(attention.key)))

    def is_forward(self, node: Node) -> bool:
        return node.target in FORWARDS

    def backward(self, node: Node) -> Backward | None:
        grad: Any = node.args[0] if node.args else None  # named grad_out or grad_out_
        return _Backward(node, grad) if node.target in BACKWARDS else None


class _Backward(Backward):
    def obstacle(self, batch: int) -> str | None:
        dropout = _given(self.node)["dropout_p"]
        if dropout:
            return f"attention dropout {dropout:g}"
        return "an attention mask with a gradient" if self.uses_of(MASK) else None

    def arguments(self, rv: RowValues, heads: Layout) -> Arguments:
        given = _given(self.node)
        query, key, scale = given["query"], given["key"], given["scale"]
        mask = given.get("attn_mask", given.get("attn_bias"))
        if mask is not None:
            lead = [1] * (4 - len(shape_of(mask)))
            mask = rv.emit.call(aten.view.default, mask, [*lead, *shape_of(mask)]) if lead else mask
            operand = rv.at.operand(mask, heads, (*shape_of(query)[:3], shape_of(key)[2]))
            assert operand is not None  # four axes line up with the scores
            mask = operand.made(rv)
        statistics = given["logsumexp"]  # [B, heads, >= S] or [B, heads, S, 1]
        if len(shape_of(statistics)) == 4:
            statistics = rv.emit.call(aten.squeeze.dim, statistics, 3)
        return Arguments(
            *(query, key, given["value"], given["out"]),
            logsumexp=rv.gather(statistics, heads[:3]),
            mask=mask,
            causal=given["is_causal"],
            scale=1.0 / math.sqrt(shape_of(query)[-1]) if scale is None else scale,
        )


def _given(node: Node) -> dict[str, Any]:
    """The call's arguments by the names in its schema: their order differs between forms and releases."""
    target: Any = node.target
    parameters = compat.schema(target).arguments
    given: dict[str, Any] = {p.name: p.default_value for p in parameters}
    return given | dict(zip((p.name for p in parameters), node.args, strict=False)) | node.kwargs
