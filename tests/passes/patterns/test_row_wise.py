"""Calls that work on every position by itself, and operands that are not of the same positions."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from cggr_compile.passes.patterns.row_wise import not_row_wise


def placeholder(graph: Graph, name: str, value: torch.Tensor) -> Node:
    node = graph.placeholder(name)
    node.meta["example_value"] = value
    return node


def test_experts_take_rows_of_all_their_operands() -> None:
    """Weights are for all rows, however many axes they have; the choice of experts is each token's own."""
    graph, floats = Graph(), {"hidden": (6, 4), "gate_up": (2, 6, 4), "down": (2, 4, 3), "weights": (6, 1)}
    nodes = [placeholder(graph, name, torch.empty(shape, device="meta")) for name, shape in floats.items()]
    nodes.append(placeholder(graph, "experts", torch.empty(6, 1, dtype=torch.int64, device="meta")))
    call = graph.call_function(torch.ops.cggr.moe.default, tuple(nodes))
    hidden, _, _, weights, experts = nodes
    assert not_row_wise(call, {hidden, weights, experts}) == ""
    assert "experts experts are of all tokens" in not_row_wise(call, {hidden, weights})
