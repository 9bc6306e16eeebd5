"""The package flash-attn (FlashAttention-2, arXiv 2307.08691): dense sequences, and packed ones.

Its operators read and write [B, S, heads, D], or [tokens, heads, D] where sequences are packed. Dynamo sees an autograd
function around one of them; the joint graph has its backward functionalized::

    _, dq, dk, dv = auto_functionalized_v2(flash_attn._flash_attn_backward, dout=..., q=..., _all_bases=[...])
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from cggr_compile import compat
from cggr_compile.passes.facts import Attention
from cggr_compile.passes.nodes import argument, fake_value, op_name, same_size, shape_of
from cggr_compile.passes.patterns.attention.base import Arguments, AttentionAdapter, Backward, Forward, Hides

if TYPE_CHECKING:
    from cggr_compile.passes.fx import Emitter
    from cggr_compile.passes.joint.row_sparse.layout import Layout
    from cggr_compile.passes.joint.row_sparse.values import RowValues

aten = torch.ops.aten

# known by name: the package need not be installed, nor imported before this module
DENSE, PACKED = "flash_attn._flash_attn_forward", "flash_attn._flash_attn_varlen_forward"
FORWARDS = (f"{DENSE}.default", f"{PACKED}.default")
PACKED_BACKWARD = "flash_attn._flash_attn_varlen_backward.default"
BACKWARDS = ("flash_attn._flash_attn_backward.default", PACKED_BACKWARD)
GRADIENTS = ("dq", "dk", "dv")


class FlashAttn(AttentionAdapter):
    """``flash_attn_func`` and ``flash_attn_varlen_func``: causal, windows on both sides, soft-capped scores."""

    kind = "flash"

    def recognise(self, node: Node, stream: Collection[Node]) -> Forward | None:
        found = _operands(node)
        if found is None:
            return None
        query, key, value, packed = found
        if not packed:
            return Forward(query, key, value, -3, -3, node, node)
        # [tokens, heads, D], of all sequences: a marker needs them apart
        return Forward(query, _before_packing(key), _before_packing(value), -3, -3, key, value)

    def hides(self, attention: Attention, stream: Collection[Node]) -> Hides | str | None:
        found = _operands(attention.node)
        if found is None or not found[3]:
            return None
        starts = _inside(attention.node, 4, "cu_seqlens_k")
        return _Packed(starts, attention.key) if isinstance(starts, Node) else "flash-attn whose cu_seqlens is no input"

    def is_forward(self, node: Node) -> bool:
        return str(node.target) in FORWARDS

    def backward(self, node: Node) -> Backward | None:
        if str(node.target) != "auto_functionalized_v2" or str(node.args[0]) not in BACKWARDS:
            return None
        grad: Any = node.kwargs["dout"]
        keys = [key for key in node.kwargs if key.startswith(tuple(f"_{name}_" for name in GRADIENTS))]
        found = {node.kwargs.get(f"_{name}_base_index"): i for i, name in enumerate(GRADIENTS)}
        if len(keys) != len(GRADIENTS) or len(found) != len(GRADIENTS) or None in found:
            return None  # they are written into parts of other tensors
        gradients = {1 + int(base): i for base, i in found.items()}  # type: ignore[arg-type]  # result 0 is its own
        return _Backward(node, grad, gradients, ("BS", None, None) if _packed(node) else ("B", "S", None, None))


@dataclass(frozen=True)
class _Packed(Hides):
    """Sequences that begin at ``starts``, int32 [sequences + 1] (with the end); ``like``: [B, S, heads, D]."""

    starts: Node
    like: Node = field(compare=False)

    @property
    def inputs(self) -> tuple[Node, ...]:
        return (self.starts,)

    def previous(self, emit: Emitter) -> Node:
        batch, length = (emit.size(self.like, axis) for axis in (0, 1))
        tokens = emit.integer(operator.mul, batch, length)
        begins = emit.call(
            torch.zeros, emit.integer(operator.add, tokens, 1), dtype=torch.bool, device=fake_value(self.starts).device
        )
        begins = emit.method("index_fill", begins, 0, emit.method("long", self.starts), True)
        inside = emit.call(torch.logical_not, emit.method("narrow", begins, 0, 0, tokens))
        return emit.method("view", inside, batch, length)


class _Backward(Backward):
    def obstacle(self, batch: int) -> str | None:
        given = self.node.kwargs
        if given["dropout_p"]:
            return f"attention dropout {given['dropout_p']:g}"
        if given["alibi_slopes"] is not None:
            return "flash-attn with ALiBi slopes"
        if _packed(self.node) and batch > 1:
            return "flash-attn over packed sequences, in a batch of more than one"
        return None

    def arguments(self, rv: RowValues, heads: Layout) -> Arguments:
        given: Any = self.node.kwargs
        mask, causal = _mask(rv, self.node)
        query, key, value, out = (self.to_heads(rv, given[name]) for name in ("q", "k", "v", "out"))
        statistics = given["softmax_lse"]
        if _packed(self.node):
            statistics = rv.emit.call(aten.unsqueeze.default, statistics, 0)
        return Arguments(
            *(query, key, value, out),
            logsumexp=rv.gather(statistics, heads[:3]),
            mask=mask,
            causal=causal,
            scale=given["softmax_scale"],
            softcap=given["softcap"],
        )

    def to_heads(self, rv: RowValues, tensor: Node) -> Node:
        if _packed(self.node):
            tensor = rv.emit.call(aten.unsqueeze.default, tensor, 0)
        return rv.emit.call(aten.permute.default, tensor, [0, 2, 1, 3])

    def from_heads(self, rv: RowValues, tensor: Node) -> Node:
        tensor = rv.emit.call(aten.permute.default, tensor, [0, 2, 1, 3])
        return rv.emit.call(aten.squeeze.dim, tensor, 0) if _packed(self.node) else tensor


def _operands(node: Node) -> tuple[Node, Node, Node, bool] | None:
    """Query, key and value of the autograd function at ``node`` of Dynamo's graph, and whether they are packed."""
    call = _call(node) if op_name(node) == "autograd_function_apply" else None
    if call is None:
        return None
    found = [_inside(node, i, name) for i, name in enumerate("qkv")]
    if not all(isinstance(tensor, Node) for tensor in found):
        return None
    return *found, _operator(call) == PACKED  # type: ignore[return-value]


def _call(node: Node) -> Node | None:
    """The operator's call in the body of the autograd function at ``node``."""
    body = _body(node)
    inside = [n for n in body.graph.nodes if _operator(n) in (DENSE, PACKED)] if body is not None else []
    return inside[0] if len(inside) == 1 else None


def _inside(node: Node, position: int, name: str) -> Node | None:
    """What the autograd function at ``node`` is given that its operator gets as this argument."""
    call = _call(node)
    assert call is not None
    inputs, operands = call.graph.find_nodes(op="placeholder"), node.args[2:]
    inputs = inputs[len(inputs) - len(operands) :]  # older releases give the context first
    passed = argument(call, position, name)
    given = dict(zip(inputs, operands, strict=True))
    return given.get(_unpadded(passed)) if isinstance(passed, Node) else None


def _body(node: Node) -> GraphModule | None:
    held = node.args[0]
    name = str(held.target) if isinstance(held, Node) and held.op == "get_attr" else ""
    found = getattr(node.graph.owning_module, name, None)
    return found if isinstance(found, GraphModule) else None


def _operator(node: Node) -> str:
    target = node.target
    if isinstance(target, compat.OpOverload):
        target = target.overloadpacket
    return str(target) if isinstance(target, compat.OpOverloadPacket) else ""


def _unpadded(tensor: Node) -> Node:
    """The package pads heads to a multiple of 8."""
    return tensor.args[0] if op_name(tensor) == "pad" else tensor  # type: ignore[return-value]


def _before_packing(node: Node) -> Node:
    """x [B, S, heads, D] where ``node`` is a view of it as [B * S, heads, D]; else ``node``."""
    if op_name(node) not in ("view", "reshape"):
        return node
    source: Node = argument(node, 0, "input")
    before, after = shape_of(source), shape_of(node)
    alike = len(before) == 4 and len(after) == 3 and all(map(same_size, before[2:], after[1:]))
    return source if alike else node


def _packed(node: Node) -> bool:
    return str(node.args[0]) == PACKED_BACKWARD


def _mask(rv: RowValues, node: Node) -> tuple[Node | None, bool]:
    """What the selected queries attend to: bool [B, 1, K, keys] (None: everything), and whether causally as well.

    A query sees ``window_size_left`` keys before and ``window_size_right`` after its own; -1 is no bound. The last
    query's own key is the last one, of each sequence.
    """
    given: Any = node.kwargs
    packed, tokens = _packed(node), 0 if _packed(node) else 1
    left, right = given["window_size_left"], 0 if given["causal"] else given["window_size_right"]
    queries, keys = shape_of(given["q"])[tokens], shape_of(given["k"])[tokens]
    starts = [given["cu_seqlens_q"], given["cu_seqlens_k"]] if packed else []
    aligned = starts[0] is starts[1] if packed else queries == keys
    causal = aligned and right == 0
    before, after = 0 <= left < keys - 1, right >= 0 and not causal
    if not packed and not before and not after:
        return None, causal

    def seen(rows: Tensor, *starts: Tensor) -> Tensor:
        row = rows.view(rv.batch, 1, rv.slots, 1)
        column = torch.arange(keys, device=rows.device)
        conditions = []
        if packed:
            sequence, row = _from_the_end(row, starts[0])
            other, column = _from_the_end(column, starts[1])
            conditions.append(sequence == other)
        elif not aligned:
            column = column - (keys - queries)
        if after:
            conditions.append(column - row <= right)
        if before:
            conditions.append(row - column <= left)
        return functools.reduce(torch.bitwise_and, conditions).expand(rv.batch, 1, rv.slots, keys)

    return rv.emit.trace(seen, rv.rows, *starts), causal


def _from_the_end(tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The packed sequence of each token, and the token's place in it counted from its end (-1 is the last).

    ``starts`` [sequences + 1]: where each begins, and the end. Tokens behind the last one belong to it.
    """
    ends = starts[1:].long()
    sequence = (tokens[..., None] >= ends).sum(-1).clamp(max=len(ends) - 1)
    return sequence, tokens - ends[sequence]
