from __future__ import annotations

import torch
from torch.fx import Graph

from cggr_compile.passes.joint.row_sparse.placement import place_early

aten = torch.ops.aten


def program(recompute=False):
    """A joint graph as the rules leave it: everything they made stands where the backward pass asked for it."""
    graph = Graph()
    x, rows, grad = (graph.placeholder(name) for name in ("primals_1", "primals_2", "tangents_1"))
    dense = graph.call_function(aten.exp.default, (x,))
    if recompute:
        dense.meta["recompute"] = 1
    loss = graph.call_function(aten.sum.default, (dense,))
    used = graph.call_function(aten.full.default, ([4], 0.5))
    unused = graph.call_function(aten.full.default, ([4], 0.0))
    gathered = graph.call_function(aten.index.Tensor, (dense, [rows]))
    scaled = graph.call_function(aten.mul.Tensor, (gathered, used))
    product = graph.call_function(aten.mul.Tensor, (scaled, grad))
    result = graph.call_function(aten.add.Tensor, (product, unused))
    graph.output((loss, result))
    return (
        graph,
        {"loss": loss, "gathered": gathered, "scaled": scaled, "product": product, "unused": unused},
        {*(used, unused, gathered, scaled, product, result)},
    )


def order(graph, nodes):
    place_early(graph, nodes[1])
    graph.lint()
    places = {node: index for index, node in enumerate(graph.nodes)}
    return {name: places[node] for name, node in nodes[0].items()}


def test_rows_are_made_where_the_dense_value_is():
    graph, *nodes = program()
    at = order(graph, nodes)
    assert at["gathered"] < at["loss"] and at["scaled"] < at["loss"]
    assert at["product"] > at["loss"]  # needs a gradient
    assert at["unused"] > at["loss"]  # a constant of the backward pass


def test_rows_of_a_recomputed_value_stay():
    graph, *nodes = program(recompute=True)
    at = order(graph, nodes)
    assert at["gathered"] > at["loss"] and at["scaled"] > at["loss"]
