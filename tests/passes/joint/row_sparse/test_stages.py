"""Each stage of the forward pass gathers with an index of its own."""

from __future__ import annotations

from collections import defaultdict

import models
import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph

from cggr_compile.passes.joint import row_sparse
from cggr_compile.passes.joint.row_sparse.placement import place_early
from cggr_compile.passes.joint.row_sparse.stages import LAYERS, stages
from cggr_compile.passes.patterns.attention import is_attention

BARRIER = torch.ops.cggr.fusion_barrier.default
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def program(before, after, recompute=False):
    """Attentions before and after the selection, and the stage of each."""
    graph = Graph()
    node = graph.placeholder("x")
    attentions = []
    for _ in range(before):
        attentions.append(node := graph.call_function(ATTENTION, (node, node, node)))
    rows = graph.call_function(BARRIER, (node,))
    for _ in range(after):
        attentions.append(node := graph.call_function(ATTENTION, (node, node, node)))
    if recompute:
        node.meta["recompute"] = 1
    found = stages(list(graph.nodes), rows)
    return [found.get(attention, 0) for attention in attentions]


def test_stages_begin_with_the_selection():
    assert LAYERS == 2
    assert program(3, 5) == [0, 0, 0, 1, 1, 2, 2, 3]


def test_no_stages_where_activations_are_recomputed():
    assert program(1, 4, recompute=True) == [0] * 5


@pytest.mark.parametrize("staged", [True, False])
def test_no_kernel_can_gather_for_all_layers(staged, monkeypatch):
    """A code generator fuses the readers of one index: those of two layers, however many layers there are."""
    monkeypatch.setattr(models, "LAYERS", 6)
    if not staged:  # the control
        monkeypatch.setattr(row_sparse, "stages", lambda forward, rows: {})
    graphs = []
    monkeypatch.setattr(row_sparse, "place_early", lambda graph, made: (place_early(graph, made), graphs.append(graph)))
    decoder, batch = models.Decoder(), models.make_batch()
    step = torch.compile(
        lambda ids: F.cross_entropy(decoder(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
        backend="cggr",
        options={"compiler": "eager", "router_layers": 1},
    )
    step(batch["input_ids"])
    (graph,) = graphs
    most = max(len(layers) for layers in layers_by_index(graph))
    assert most == (2 if staged else 6)


def layers_by_index(graph):
    """For every index tensor, behind how many attentions the values are that the forward pass gathers with it."""
    layers, current = defaultdict(set), 0
    for node in graph.nodes:
        if node.target is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            break
        current += is_attention(node)
        if node.target in (torch.ops.aten.gather.default, torch.ops.aten.index.Tensor):
            index = node.all_input_nodes[1]
            while index.all_input_nodes and index.target is not BARRIER:
                index = index.all_input_nodes[0]
            if index.target is BARRIER:
                layers[index].add(current)
    return layers.values()
