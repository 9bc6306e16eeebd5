"""Keeps shared key and value heads shared: attention over repeated heads becomes grouped-query attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from cggr_compile.passes.analysis.modes import Modes, modes_of
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import Attention, LayerStack
from cggr_compile.passes.nodes import argument, fake_value, op_name, same_size, shape_of

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_DIM = 256


class GroupQueries(SemanticPass):
    """Undoes the repetition of key and value heads in front of scaled_dot_product_attention. Before::

        k = k[:, :, None].expand(B, kv_heads, n, S, d).reshape(B, kv_heads * n, S, d)      # and v alike
        y = scaled_dot_product_attention(q, k, v, is_causal=True)

    after::

        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    Exact, and n times less to store for the backward pass. Only where every fused kernel that PyTorch may choose
    takes shared heads: without a mask or dropout; on CUDA in 16 bits and for heads of at most 256.
    """

    name = "group_queries"
    level = "routed"
    needs = (LayerStack,)
    provides = (LayerStack,)
    optional = True

    def enabled(self, ctx: GraphContext) -> bool:
        return True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        blocks, changed = [], 0
        reasons: dict[str, None] = {}
        modes = modes_of(gm.graph)
        for block in ctx[LayerStack].blocks:
            attentions = []
            for attention in block.attentions:
                found = _shared(attention, modes[attention.node])
                if isinstance(found, str):
                    reasons[found] = None
                else:
                    key, value = found
                    _attend_to(attention.node, attention, key, value)
                    attention, changed = replace(attention, key=key, value=value), changed + 1
                attentions.append(attention)
            blocks.append(replace(block, attentions=tuple(attentions)))
        if not changed:
            return PassResult(False, "; ".join(reasons))
        ctx.add(replace(ctx[LayerStack], blocks=tuple(blocks)))
        kept = f"; the others: {'; '.join(reasons)}" if reasons else ""
        return PassResult(
            True, f"{changed} of {len(ctx[LayerStack].attentions)} attentions share key and value heads{kept}"
        )


def _shared(attention: Attention, modes: Modes) -> tuple[Node, Node] | str:
    """The keys and values before their repetition, or why there are none."""
    node = attention.node
    if attention.kind != "sdpa":
        return "attention is written without scaled_dot_product_attention"
    if attention.mask is not None:
        return "not every kernel shares heads under a mask"
    if argument(node, 4, "dropout_p"):
        return "not every kernel shares heads under dropout"
    if argument(node, 7, "enable_gqa"):
        return "heads are shared already"
    query = fake_value(argument(node, 0, "query"))
    device = query.device.type
    if device not in ("cpu", "cuda"):
        return f"not every kernel shares heads on {device}"
    if device == "cuda" and modes.product_dtype(query) not in _FLASH_DTYPES:
        return f"not every kernel shares heads on cuda in {modes.product_dtype(query)}"
    if not all(
        isinstance(size := shape_of(n)[-1], int) and size <= _FLASH_DIM for n in (attention.key, attention.value)
    ):
        return f"heads wider than {_FLASH_DIM}"
    key, value = _before_repetition(attention.key), _before_repetition(attention.value)
    if key is None or value is None:
        return "no repeated heads"
    if shape_of(key)[1] != shape_of(value)[1]:
        return "keys and values have different numbers of heads"
    repeated = ((attention.key, key), (attention.value, value))
    if any(fake_value(many).requires_grad != fake_value(few).requires_grad for many, few in repeated):
        return "heads are repeated under no_grad"
    return key, value


def _before_repetition(node: Node) -> Node | None:
    """``x`` [B, h, S, d] where ``node`` repeats each of its heads n times in place, as [B, h n, S, d]."""
    result = shape_of(node)
    if len(result) != 4:
        return None
    if op_name(node) == "repeat_interleave":
        source, count = argument(node, 0, "input"), argument(node, 1, "repeats")
        ok = argument(node, 2, "dim") in (1, -3) and isinstance(count, int)
        return source if ok else None
    if op_name(node) not in ("reshape", "view"):
        return None
    spread: Any = argument(node, 0, "input")
    if op_name(spread) != "expand":
        return None
    lone: Any = argument(spread, 0, "input")
    source = argument(lone, 0, "input") if op_name(lone) in ("getitem", "unsqueeze") else None
    if not isinstance(source, Node):
        return None
    before, middle, after = shape_of(source), shape_of(lone), shape_of(spread)
    if (
        len(before) != 4
        or len(middle) != 5
        or len(after) != 5
        or not all(isinstance(h, int) for h in (*after[1:3], result[1]))
    ):
        return None
    # [B, h, S, d] -> [B, h, 1, S, d] -> [B, h, n, S, d] -> [B, h n, S, d]; getitem may also slice: sizes tell
    same = all(
        same_size(a, b)
        for new in ((*middle[:2], *middle[3:]), (*after[:2], *after[3:]))
        for a, b in zip(before, new, strict=True)
    )
    if not same or middle[2] != 1 or result[1] != after[1] * after[2]:
        return None
    return source if all(same_size(before[i], result[i]) for i in (0, 2, 3)) and _only_inserts(lone) else None


def _only_inserts(node: Node) -> bool:
    """x.unsqueeze(2) or x[:, :, None, ...]: no reversed, strided or selecting index beside the new axis."""
    if op_name(node) == "unsqueeze":
        return argument(node, 1, "dim") in (2, -3)
    index: Any = node.args[1]
    index = tuple(entry for entry in index if entry is not Ellipsis) if isinstance(index, tuple) else ()
    whole = [entry for entry in index if entry == slice(None)]
    return None in index and index.index(None) == 2 and len(whole) == len(index) - 1


def _attend_to(node: Node, attention: Attention, key: Node, value: Node) -> None:
    """Make scaled_dot_product_attention read ``key`` and ``value`` and share their heads."""
    for position, name, old, new in ((1, "key", attention.key, key), (2, "value", attention.value, value)):
        assert argument(node, position, name) is old
        if len(node.args) > position:
            node.update_arg(position, new)
        else:
            node.update_kwarg(name, new)
    node.update_kwarg("enable_gqa", True)
