"""Attention written out: ``softmax(q k^T) v``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from cggr_compile.passes.facts import Attention
from cggr_compile.passes.nodes import argument, fake_value, op_name, same_size, shape_of
from cggr_compile.passes.patterns.attention.base import AttentionAdapter, Forward, Hides
from cggr_compile.passes.patterns.attention.dense_mask import DenseMasks

# what may stand between softmax and the two products
_BEFORE_SOFTMAX = (
    *("mul", "div", "add", "sub", "masked_fill", "where", "tanh", "to", "float", "type_as", "contiguous"),
    *("max", "maximum", "clamp"),
)
_AFTER_SOFTMAX = ("dropout", "to", "type", "type_as", "float", "half", "bfloat16", "contiguous")
# the products of queries and keys: their factors among the arguments
_SCORES = {
    "matmul": ((0, "input"), (1, "other")),
    "bmm": ((0, "input"), (1, "mat2")),
    "baddbmm": ((1, "batch1"), (2, "batch2")),
}
_WEIGHTED = ("matmul", "bmm")


class Composite(AttentionAdapter):
    """Two products around a softmax over the last axis.

    In the joint graph it is ordinary operators, which the rules for products, sums and elementwise calls carry.
    """

    kind = "softmax"

    def recognise(self, node: Node, stream: Collection[Node]) -> Forward | None:
        products = _products_around(node, stream) if op_name(node) == "softmax" else None
        if products is None:
            return None
        scores, weighted, mask = products
        query, key = (argument(scores, *place) for place in _SCORES[op_name(scores)])
        value = argument(weighted, *_SCORES[op_name(weighted)][1])
        if not all(isinstance(tensor, Node) for tensor in (query, key, value)):
            return None
        keys, values = _unfolded(key, -1, scores), _unfolded(value, -2, weighted)  # the key arrives transposed
        return Forward(query, keys.tensor, values.tensor, keys.axis, values.axis, keys.user, values.user, mask)

    def hides(self, attention: Attention, stream: Collection[Node]) -> Hides | str | None:
        scores = _without_sinks(attention.node.all_input_nodes[0])
        masks: dict[Node, bool] = {}
        while op_name(scores) not in _SCORES:
            source = _from_product(scores, stream)
            assert source is not None
            for other in scores.all_input_nodes:
                if other is source or len(shape_of(other)) < 2:
                    continue
                if other in stream:
                    return f"hand-written attention whose scores are added to {other}, computed of the tokens"
                hidden = _hides(scores, other, source)
                if hidden is None:
                    return f"hand-written attention whose scores go through {op_name(scores)!r} with {other}"
                masks[other] = hidden
            scores = source
        if op_name(scores) == "baddbmm" and argument(scores, 3, "beta", 1) != 0:
            return "hand-written attention whose products are added to another tensor"
        rank = max(len(shape_of(attention.node)), len(shape_of(attention.key)))
        if any(rank > len(shape_of(mask)) == 3 and not same_size(shape_of(mask)[0], 1) for mask in masks):
            return "hand-written attention whose mask has one axis for sequences and heads"
        return DenseMasks(tuple(masks), tuple(masks.values()), rank) if masks else None


def _products_around(node: Node, stream: Collection[Node]) -> tuple[Node, Node, Node | None] | None:
    """The products q k^T before a softmax over the last axis and p v after it, and what is added in between."""
    axis = argument(node, 1, "dim")
    if axis is None or axis % max(1, len(shape_of(node))) != len(shape_of(node)) - 1:
        return None
    scores = _without_sinks(node.all_input_nodes[0])
    sinks = scores is not node.all_input_nodes[0]
    mask: Node | None = None
    while op_name(scores) not in _SCORES:
        source = _from_product(scores, stream)
        if source is None:
            return None
        added = [n for n in scores.all_input_nodes if n not in stream and len(shape_of(n)) >= 2]
        if op_name(scores) == "add" and added:
            mask = added[0]
        scores = source
    weights = node
    while True:
        users = [user for user in weights.users if user in stream]
        if len(users) != 1:
            return None
        user = users[0]
        if op_name(user) in _WEIGHTED:
            break
        dropped = sinks and op_name(user) == "getitem" and user.args[1] == (..., slice(None, -1))
        if op_name(user) not in _AFTER_SOFTMAX and not _folds_heads(user) and not dropped:
            return None
        weights = user
    if argument(user, 0, "input") is not weights:
        return None
    return scores, user, mask


def _from_product(scores: Node, stream: Collection[Node]) -> Node | None:
    """The operand of ``scores`` that a product gives, through what may stand before a softmax; None: not just one.

    A bias that is computed of the tokens is no product's.
    """
    if op_name(scores) not in _BEFORE_SOFTMAX and not _folds_heads(scores):
        return None
    sources = [n for n in scores.all_input_nodes if n in stream]
    if len(sources) > 1 and op_name(scores) == "add":
        sources = [n for n in sources if _is_product(n, stream)]
    return sources[0] if len(sources) == 1 else None


def _is_product(scores: Node, stream: Collection[Node]) -> bool:
    found: Node | None = scores
    while found is not None and op_name(found) not in _SCORES:
        found = _from_product(found, stream)
    return found is not None


def _folds_heads(node: Node) -> bool:
    """Whether sequences and heads become one axis, or two of it: [B, heads, ...] as [B * heads, ...], or back."""
    if op_name(node) not in ("view", "reshape", "_unsafe_view"):
        return False
    four, three = sorted((shape_of(node.all_input_nodes[0]), shape_of(node)), key=len, reverse=True)
    return len(four) == 4 and len(three) == 3 and all(map(same_size, four[2:], three[1:]))


class _Operand(NamedTuple):
    """A factor, where it has its tokens, counted from the last axis, and the call that reads it."""

    tensor: Node
    axis: int
    user: Node


def _unfolded(tensor: Node, axis: int, user: Node) -> _Operand:
    """A factor [B * heads, ...] before its sequences were folded with its heads; itself where they are not."""
    found = _Operand(tensor, axis, user)
    while found.tensor.all_input_nodes and len(shape_of(found.tensor)) == 3:
        node, source = found.tensor, found.tensor.all_input_nodes[0]
        if _folds_heads(node):
            return _Operand(source, found.axis, node)
        if _swaps_last_axes(node):
            found = _Operand(source, -3 - found.axis, node)
        elif op_name(node) in ("contiguous", "to", "float"):
            found = _Operand(source, found.axis, node)
        else:
            break
    return _Operand(tensor, axis, user)


def _swaps_last_axes(node: Node) -> bool:
    """Of three axes."""
    if op_name(node) == "permute":
        order: Any = argument(node, 1, "dims")
        axes: Any = node.args[1:] if isinstance(order, int) else order
        return [axis % 3 for axis in axes] == [0, 2, 1]
    if op_name(node) in ("transpose", "swapaxes"):
        return {argument(node, 1, "dim0") % 3, argument(node, 2, "dim1") % 3} == {1, 2}
    return op_name(node) == "mT"


def _hides(call: Node, mask: Node, scores: Node) -> bool | None:
    """Whether True in ``mask`` hides what ``call`` makes of the scores, or shows it (or it is added); None: neither."""
    name, dtype = op_name(call), fake_value(mask).dtype
    if name == "add" and dtype.is_floating_point:
        return False
    if dtype != torch.bool:
        return None
    if name == "masked_fill" and argument(call, 1, "mask") is mask:
        return True
    if name == "where" and argument(call, 0, "condition") is mask:
        return argument(call, 1, "input") is not scores
    return None


def _without_sinks(scores: Node) -> Node:
    """``x`` of ``z = cat([x, sinks], -1)`` with one sink for each query, or of ``z - z.max(-1, keepdim=True).values``.

    The latter is in gpt-oss, the former in Inkling; ``scores`` where they are neither.
    """
    joined = scores
    while op_name(joined) in ("float", "to"):
        joined = joined.all_input_nodes[0]
    if op_name(scores) == "sub" and all(isinstance(n, Node) for n in scores.args):
        joined, largest = scores.args  # type: ignore[assignment]
        found = largest.args[0] if op_name(largest) == "getitem" else None  # type: ignore[arg-type, union-attr]
        if not isinstance(found, Node) or op_name(found) != "max" or found.args[0] is not joined:
            return scores
    if op_name(joined) != "cat":
        return scores
    parts: Any = argument(joined, 0, "tensors")
    last = argument(joined, 1, "dim") in (-1, len(shape_of(joined)) - 1)
    if not last or len(parts) != 2 or shape_of(parts[1])[-1] != 1:
        return scores
    return parts[0]  # type: ignore[no-any-return]
