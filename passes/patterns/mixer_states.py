"""States that a token mixer leaves for the next call, as a cache keeps them: written into tensors of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cggr_compile.passes.analysis.effects import memory, mutated_operands, overlap
from cggr_compile.passes.fx import ancestors, descendants
from cggr_compile.passes.nodes import op_name

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch.fx import Graph, Node

    from cggr_compile.passes.facts import Block

_FRESH = {"zeros", "empty", "new_zeros", "new_empty", "zeros_like", "empty_like"}


def written_states(graph: Graph) -> dict[Node, Node]:
    """New tensors that are copied into and returned, and read by nothing else; with the call that writes each.

    As ``state = zeros(...); state.copy_(x[..., -4:]); return loss, state``.
    """
    found = {}
    for node in graph.nodes:
        if op_name(node) not in _FRESH:
            continue
        users = set(node.users)
        writes = [user for user in users if op_name(user) == "copy" and mutated_operands(user) == [node]]
        rest = users.difference(writes)
        if len(writes) == 1 and not writes[0].users and all(user.op == "output" for user in rest):
            here = memory(node)
            if not any(overlap(memory(n), here) for n in graph.nodes if n not in (node, writes[0])):
                found[node] = writes[0]
    return found


def mixer_states(graph: Graph, blocks: Sequence[Block]) -> Collection[Node]:
    """Those that hold what a token mixer computes between a block's input and output."""
    written = written_states(graph)
    found = set()
    for block in blocks if written else ():
        if block.mixer is None:
            continue
        inside = descendants([block.input], stop=[block.output]) - {block.input, block.output}
        mixed = ancestors(block.mixer.nodes) | descendants(block.mixer.nodes)
        for node, write in written.items():
            sources = [n for n in write.all_input_nodes if n is not node]
            if sources and all(source in inside and _reads(source, mixed & inside) for source in sources):
                found.add(node)
    return found


def _reads(source: Node, mixed: Collection[Node]) -> bool:
    return source in mixed or any(operand in mixed for operand in source.all_input_nodes)
