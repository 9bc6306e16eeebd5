"""Parts of the forward pass, two layers each, whose row versions are made by kernels of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cggr_compile.passes.patterns.attention import is_attention

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch.fx import Node

    from cggr_compile.passes.joint.row_sparse.values import RowValues

# Layers of a stage. More save no launches: a code generator fuses what is close together only.
LAYERS = 2


def stages(forward: Sequence[Node], rows: Node) -> dict[Node, int]:
    """The stage of every node of the forward pass: 0 until ``rows`` are known, then one for every few attentions.

    Without stages a code generator sees one index tensor, and sums of the residual stream's rows that go through all
    layers. It fuses gathers across layers as it happens, so that equal layers get different kernels; the gathers of the
    residual stream all become one kernel behind the last layer, until when every layer's dense output is kept. With
    stages (and barriers between them) each stage gathers by itself, with the kernels of the one before.

    Nothing is gathered in the forward pass where activations are recomputed: there are no stages then.
    """
    if any("recompute" in node.meta for node in forward):
        return {}
    found: dict[Node, int] = {}
    selected, layers = False, LAYERS - 1
    for node in forward:
        selected = selected or node is rows
        layers += selected and is_attention(node)
        found[node] = layers // LAYERS
    return found


def separate(rv: RowValues, made: Collection[Node]) -> None:
    """Put a barrier between a row version and those of later stages that are computed from it."""
    barriers: dict[tuple[Node, int], Node] = {}
    for node in [node for node in rv.graph.nodes if node in made]:
        stage = rv.stage.get(node, 0)
        for source in node.all_input_nodes:
            if source not in made or rv.stage.get(source, stage) >= stage:
                continue
            if (source, stage) not in barriers:
                with rv.emit.before(source.next, "row_sparse"):
                    barriers[source, stage] = rv.emit.call(torch.ops.cggr.fusion_barrier.default, source, stage)
            node.replace_input_with(source, barriers[source, stage])
