"""The heads of a graph: products that make logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cggr_compile.passes.fx import descendants
from cggr_compile.passes.nodes import differentiable, fake_value, op_name, same_size, shape_of
from cggr_compile.passes.patterns.head import is_head, read_head
from cggr_compile.passes.patterns.token_values.rules.head_values import is_head_of_values

if TYPE_CHECKING:
    from torch.fx import Graph, Node

# What only logits go into: one of these makes a product a head.
OF_LOGITS = {"softmax", "log_softmax", "logsumexp", "cross_entropy", "cross_entropy_loss", "exp", "logcumsumexp"}


def find_heads(graph: Graph) -> list[Node]:
    """Products whose value reaches an operator for logits, and no other such product."""
    found = [n for n in graph.nodes if differentiable(n) and (is_head_of_values(n) or _is_head_of_logits(n))]
    of_heads = descendants(found, only=differentiable)
    last = []
    for head in found:
        behind = descendants([head], only=differentiable)
        others = any(other in behind for other in found if other is not head)
        if not others and not _leads_back(head, behind, of_heads):
            last.append(head)
    return last


def _leads_back(head: Node, behind: set[Node], of_heads: set[Node]) -> bool:
    """Whether what is computed of a head goes into a hidden state: a router of experts is such a product, too."""
    width = shape_of(head_input(head))[-1]
    for node in behind:
        shape = shape_of(node)
        if len(shape) > 1 and same_size(shape[-1], width):
            beside = (n for n in node.all_input_nodes if n not in of_heads and differentiable(n))
            if any(len(shape_of(n)) > 1 and same_size(shape_of(n)[-1], width) for n in beside):
                return True
    return False


def _is_head_of_logits(head: Node) -> bool:
    if not is_head(head) or len(shape_of(head)) < 2:
        return False
    todo, seen = [(head, shape_of(head)[-1])], {head}
    while todo:
        node, classes = todo.pop()
        for user in node.users:
            if user in seen or not differentiable(user):
                continue
            if op_name(user) in OF_LOGITS:
                return True
            value = fake_value(user)
            parts = value if isinstance(value, (tuple, list)) else (value,)
            has_classes = any(isinstance(part, torch.Tensor) and classes in part.shape for part in parts)
            if has_classes or _sliced(user):
                seen.add(user)
                todo.append((user, classes if has_classes else shape_of(user)[-1]))
    return False


def _sliced(node: Node) -> bool:
    """Logits of a padded vocabulary: its last entries are cut off."""
    return op_name(node) in ("getitem", "narrow") and len(shape_of(node)) == len(shape_of(node.all_input_nodes[0])) > 0


def head_input(head: Node) -> Node:
    hidden: Any = head.args[0] if is_head_of_values(head) else read_head(head)[0]
    return hidden  # type: ignore[no-any-return]
