"""Recognises an attention call: scaled_dot_product_attention, flex_attention, flash-attn, or softmax(q k^T) v."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from torch.fx import Node

from cggr_compile.passes.base import Attention, same_size, shape_of
from cggr_compile.passes.flash_call import flash_call
from cggr_compile.passes.fx import argument, op_name

# what may stand between softmax and the two products
_BEFORE_SOFTMAX = ("mul", "div", "add", "sub", "masked_fill", "where", "tanh", "to", "float", "type_as", "contiguous")
_KINDS: dict[str, Literal["sdpa", "flex", "flash", "softmax"]] = {
    "scaled_dot_product_attention": "sdpa",
    "flex_attention": "flex",
    "autograd_function_apply": "flash",
    "softmax": "softmax",
}
_AFTER_SOFTMAX = ("dropout", "to", "type", "type_as", "float", "half", "bfloat16", "contiguous")


def find_attention(node: Node, stream: Collection[Node], batch: Any, length: Any) -> Attention | None:
    """The attention at ``node`` whose keys and values are rows of the stream, else None.

    Keys and values must be laid out with the batch on axis 0 and all ``length`` tokens on one axis.
    """
    name = op_name(node)
    mask = None
    value_axis = -2
    if name == "scaled_dot_product_attention":
        query, key, value = (argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
        key_axis, key_user, value_user = -2, node, node
        mask = argument(node, 3, "attn_mask")
    elif name == "flex_attention":  # its BlockMask is no tensor of the scores' shape: it stays as it is
        query, key, value = node.args[:3]
        key_axis, key_user, value_user = -2, node, node
    elif (call := flash_call(node)) is not None:
        query, key, value = call.query, call.key, call.value
        key_axis, value_axis, key_user, value_user = -3, -3, node, node
        if call.packed:  # [tokens, heads, D], of all sequences: a marker needs them apart
            key_user, value_user = key, value
            key, value = _before_packing(key), _before_packing(value)
    elif name == "softmax":
        products = _products_around(node, stream)
        if products is None:
            return None
        key_user, value_user, mask = products
        query, key, value = (
            argument(key_user, 0, "input"),
            argument(key_user, 1, "other"),
            argument(value_user, 1, "other"),
        )
        key_axis = -1  # the key arrives transposed
    else:
        return None
    if not all(n in stream for n in (query, key, value)):
        return None
    axes = []
    for tensor, axis in ((key, key_axis), (value, value_axis)):
        shape = shape_of(tensor)
        if len(shape) < 3 or not same_size(shape[0], batch) or not same_size(shape[axis], length):
            return None
        axes.append(len(shape) + axis)
    return Attention(_KINDS[name], node, key, value, axes[0], axes[1], key_user, value_user, mask)


def _before_packing(node: Node) -> Node:
    """x [B, S, heads, D] where ``node`` is a view of it as [B * S, heads, D]; else ``node``."""
    if op_name(node) not in ("view", "reshape"):
        return node
    source: Node = argument(node, 0, "input")
    before, after = shape_of(source), shape_of(node)
    alike = len(before) == 4 and len(after) == 3 and all(map(same_size, before[2:], after[1:]))
    return source if alike else node


def _products_around(node: Node, stream: Collection[Node]) -> tuple[Node, Node, Node | None] | None:
    """The products q k^T before a softmax over the last axis and p v after it, and what is added in between."""
    axis = argument(node, 1, "dim")
    if axis is None or axis % max(1, len(shape_of(node))) != len(shape_of(node)) - 1:
        return None
    scores = _without_sinks(node.all_input_nodes[0])
    sinks = scores is not node.all_input_nodes[0]
    mask: Node | None = None
    while op_name(scores) != "matmul":
        sources = [n for n in scores.all_input_nodes if n in stream]
        if op_name(scores) not in _BEFORE_SOFTMAX or len(sources) != 1:
            return None
        added = [n for n in scores.all_input_nodes if n not in stream and len(shape_of(n)) >= 2]
        if op_name(scores) == "add" and added:
            mask = added[0]
        scores = sources[0]
    weights = node
    while True:
        users = [user for user in weights.users if user in stream]
        if len(users) != 1:
            return None
        user = users[0]
        if op_name(user) == "matmul":
            break
        dropped = sinks and op_name(user) == "getitem" and user.args[1] == (..., slice(None, -1))
        if op_name(user) not in _AFTER_SOFTMAX and not dropped:
            return None
        weights = user
    if argument(user, 0, "input") is not weights:
        return None
    return scores, user, mask


def _without_sinks(scores: Node) -> Node:
    """x of ``z - z.max(-1, keepdim=True).values`` with ``z = cat([x, sinks], -1)``, as in gpt-oss; else ``scores``."""
    if op_name(scores) != "sub" or not all(isinstance(n, Node) for n in scores.args):
        return scores
    joined, largest = scores.args
    found = largest.args[0] if op_name(largest) == "getitem" else None  # type: ignore[arg-type, union-attr]
    if not isinstance(found, Node) or op_name(found) != "max" or found.args[0] is not joined:
        return scores
    parts = argument(joined, 0, "tensors")  # type: ignore[arg-type]
    last = argument(joined, 1, "dim") in (-1, len(shape_of(joined)) - 1)  # type: ignore[arg-type]
    if op_name(joined) != "cat" or not last or len(parts) != 2 or shape_of(parts[1])[-1] != 1:  # type: ignore[arg-type]
        return scores
    return parts[0]  # type: ignore[no-any-return]
