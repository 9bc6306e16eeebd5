"""Where the row versions of saved activations are made: as soon as they can be, so that the dense ones are freed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cggr_compile.passes.fx import backward_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch.fx import Graph, Node


def place_early(graph: Graph, made: Collection[Node]) -> None:
    """Move each node of ``made`` that needs no gradient behind the last of its inputs.

    The rules insert where the backward pass asks. A gather left there would run at the end of the forward pass, with
    every layer's dense activations alive until then. Rows of what an activation checkpoint recomputes stay there:
    in the forward pass they would be saved, which is what the checkpoint is to avoid.
    """
    placeholders = graph.find_nodes(op="placeholder")
    backward = backward_of(graph)
    order = {node: (index, 0) for index, node in enumerate(graph.nodes)}
    last_at = {index: node for node, (index, _) in order.items()}
    recomputed: set[Node] = set()
    for node in graph.nodes:
        if "recompute" in node.meta or (node in made and not recomputed.isdisjoint(node.all_input_nodes)):
            recomputed.add(node)
    early = {node for node in made if node.all_input_nodes} - backward - recomputed
    # a constant follows its first user; in the forward pass without one it would only be saved
    early |= {node for node in made if not node.all_input_nodes and not early.isdisjoint(node.users)}
    for node in list(graph.nodes):
        if node not in early:
            continue
        anchor = max([order[placeholders[-1]], *(order[source] for source in node.all_input_nodes)])[0]
        behind = last_at[anchor]
        order[node] = (anchor, order[behind][1] + 1)
        behind.append(node)
        last_at[anchor] = node
