"""Writes the attention of ``nn.MultiheadAttention`` as its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from cggr_compile.passes.analysis.modes import modes_of
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value, op_name, shape_of
from cggr_compile.passes.patterns.multi_head import NAME, MultiHeadCall, read_call

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


class OpenAttention(SemanticPass):
    """Replaces the one function by projections and an attention operator, which the passes behind know. Before::

        y = multi_head_attention_forward(x.transpose(1, 0), ..., attn_mask=mask, need_weights=False)[0].transpose(1, 0)

    after::

        q, k, v = linear(x, in_weight, in_bias).chunk(3, -1)                            # [B, S, H] each
        heads = scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=~mask)
        y = linear(heads.transpose(1, 2).flatten(2), out_weight, out_bias)

    The same operators that the function calls, in the same order; only the sequences have their axis in front
    throughout. Left alone, with the reason: what ``read_call`` does not read.
    """

    name = "open_attention"
    optional = True

    def enabled(self, ctx: GraphContext) -> bool:
        return True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        emit, modes = Emitter(gm.graph, ctx.fake_mode), modes_of(gm.graph)
        calls = [node for node in gm.graph.nodes if op_name(node) == NAME]
        opened, reasons = 0, dict[str, None]()
        for node in calls:
            call = read_call(node)
            if not isinstance(call, str) and len({modes[n] for n in (*call.swaps, node)}) > 1:
                call = "it is transposed under another grad mode or autocast"
            if isinstance(call, str):
                reasons[call] = None
            else:
                _open(emit, node, call)
                opened += 1
        if not calls:
            return PassResult(False, f"no {NAME}")
        kept = "; ".join(reasons)
        if not opened:
            return PassResult(False, f"attention stays as it is: {kept}")
        others = f"; the others stay as they are: {kept}" if kept else ""
        return PassResult(True, f"{opened} of {len(calls)} calls of {NAME}{others}")


def _open(emit: Emitter, node: Node, call: MultiHeadCall) -> None:
    with emit.before(node, OpenAttention.name):
        made = _parts(emit, call)
        swapped = emit.method("transpose", made[-1], 0, 1)
    for part in (*made, swapped):
        part.meta.update({name: node.meta[name] for name in ("nn_module_stack",) if name in node.meta})
    for swap in call.swaps[1:]:
        swap.replace_all_uses_with(made[-1])
        emit.graph.erase_node(swap)
    call.result.replace_all_uses_with(swapped)
    for old in (call.result, node, *([] if swapped.users else [swapped])):
        emit.graph.erase_node(old)


def _parts(emit: Emitter, call: MultiHeadCall) -> list[Node]:
    """The calls that make the output [B, S, H], in order."""
    made: list[Node] = []

    def add(insert: Callable[..., Node], *args: Any, **kwargs: Any) -> Node:
        made.append(insert(*args, **kwargs))
        return made[-1]

    width = shape_of(call.in_weight)[1]
    together = add(emit.call, F.linear, call.source, call.in_weight, call.in_bias)
    heads = []
    for i in range(3):
        one = add(emit.method, "narrow", together, -1, i * width, width)
        heads.append(add(emit.method, "transpose", add(emit.method, "unflatten", one, -1, (call.heads, -1)), 1, 2))
    mask = call.mask
    if mask is not None and fake_value(mask).dtype is torch.bool:
        mask = add(emit.call, torch.logical_not, mask)
    attended = add(
        emit.call,
        F.scaled_dot_product_attention,
        *heads,
        attn_mask=mask,
        dropout_p=call.dropout,
        is_causal=call.is_causal,
    )
    joined = add(emit.method, "flatten", add(emit.method, "transpose", attended, 1, 2), 2)
    add(emit.call, F.linear, joined, call.out_weight, call.out_bias)
    return made
