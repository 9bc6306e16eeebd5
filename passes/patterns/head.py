"""The head as models write it: a product with a weight, what is done to its logits, which positions have some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cggr_compile.passes.facts import LossSite
from cggr_compile.passes.fx import layout_only
from cggr_compile.passes.nodes import argument, op_name, same_size, shape_of

if TYPE_CHECKING:
    from torch.fx import Node

CASTS = ("float", "to", "type", "half", "bfloat16", "double", "type_as")


def is_head(node: Node) -> bool:
    if op_name(node) == "linear":
        return True
    return op_name(node) == "matmul" and _transposed_weight(node) is not None


def _transposed_weight(node: Node) -> Any:
    """W of ``hidden @ W.T`` (or a stored [H, V] matrix)."""
    right = argument(node, 1, "other")
    if right is None or len(shape_of(right)) != 2:
        return None
    return right


def read_head(head: Node) -> tuple[Node, Node, Node | None, bool]:
    hidden: Any = head.args[0] if head.args else head.kwargs["input"]
    if op_name(head) == "linear":
        return hidden, argument(head, 1, "weight"), argument(head, 2, "bias"), False
    return hidden, _transposed_weight(head), None, True


def scalar_factor(node: Node) -> float | None:
    """c of ``x * c``, ``c * x`` or ``x / c`` with a Python number."""
    left, right = argument(node, 0, "input"), argument(node, 1, "other")
    if isinstance(right, (int, float)):
        return float(right) if op_name(node) == "mul" else 1.0 / float(right)
    if isinstance(left, (int, float)) and op_name(node) == "mul":
        return float(left)
    return None


def swaps_class_axis(node: Node) -> bool:
    """[B, S, V] -> [B, V, S], the layout that cross_entropy takes for sequences."""
    name = op_name(node)
    if name not in ("transpose", "swapaxes", "permute", "mT") or len(shape_of(node)) != 3:
        return False
    if name == "mT":
        return True
    axes: Any = node.args[1:]
    if len(axes) == 1:  # permute(x, (0, 2, 1))
        axes = axes[0]
    axes = [axis % 3 for axis in axes]
    return axes == [0, 2, 1] if name == "permute" else sorted(axes) == [1, 2]


def token_slice(node: Node) -> int | None:
    """First kept position of a slice along axis 1 of [B, S, ...]; None for any other indexing.

    Slices with a step, along other axes, or from the end of a symbolic size are none; full slices start at 0.
    """
    source = node.all_input_nodes[0]
    index = node.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    rank = len(shape_of(source))
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (rank - len(items) + 1)
    begin = 0
    for axis, item in enumerate(items):
        if not isinstance(item, slice) or item.step not in (None, 1):
            return None
        before, after = shape_of(source)[axis], shape_of(node)[axis]
        if same_size(before, after):
            continue
        start = item.start or 0
        if axis != 1 or rank != 3 or not isinstance(start, int) or (start < 0 and not isinstance(before, int)):
            return None
        begin = max(0, start + before) if start < 0 else start
    return begin


def returned_logits(site: LossSite) -> set[Node]:
    """The logits, and what is the logits in another dtype, layout, scale or for some of the positions, [..., V]."""
    found = set(site.chain)
    todo = list(site.chain)
    while todo:
        for user in todo.pop().users:
            if user not in found and _same_logits(user, site.vocab):
                found.add(user)
                todo.append(user)
    return found


def _same_logits(node: Node, vocab: int) -> bool:
    shape = shape_of(node)
    if len(node.all_input_nodes) != 1 or not shape or not same_size(shape[-1], vocab):
        return False
    name = op_name(node)
    if name in ("mul", "div"):
        return scalar_factor(node) is not None
    return name in (*CASTS, "tanh", "getitem", "narrow") or layout_only(node)
