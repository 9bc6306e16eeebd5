"""The collectives of sharded parameters in an ATen graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cggr_compile import compat
from cggr_compile.passes.fx import ancestors, is_static
from cggr_compile.passes.joint.reshard_after_forward import rearranges
from cggr_compile.passes.nodes import fake_value

if TYPE_CHECKING:
    from torch.fx import Graph, Node


def nbytes(node: Node) -> int:
    value = fake_value(node)
    return int(value.numel() * value.element_size())


def gathers(graph: Graph) -> list[Node]:
    """What gathers a parameter, in order: it can be done at any time."""
    found = graph.find_nodes(op="call_function", target=compat.ALL_GATHER)
    return [node for node in found if _waited(node) and is_static(node) and free(node)]


def reductions(graph: Graph) -> list[Node]:
    """What reduces a gradient that is only returned, in order: it can be waited for at any time."""
    found = [node for node in graph.nodes if node.target in (compat.REDUCE_SCATTER, compat.ALL_REDUCE)]
    return [node for node in found if _waited(node) and is_static(node) and finishing(node) is not None]


def wait_of(collective: Node) -> Node:
    return next(iter(collective.users))


def free(gather: Node) -> bool:
    """Whether what it gathers is an argument of the graph, or rearranged from one."""
    return all(node.op == "placeholder" or rearranges(node) for node in ancestors([gather]) - {gather})


def finishing(reduction: Node) -> list[Node] | None:
    """The wait for it and all that is computed of that, in order; None where that is more than a layout."""
    found, todo = [], [wait_of(reduction)]
    while todo:
        node = todo.pop()
        if node.op == "output":
            continue
        if not rearranges(node) or len(node.all_input_nodes) != 1:
            return None
        found.append(node)
        todo.extend(node.users)
    return found


def _waited(collective: Node) -> bool:
    return len(collective.users) == 1 and wait_of(collective).target is compat.WAIT
