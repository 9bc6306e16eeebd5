"""Has the backward pass gather sharded parameters anew, so that a step keeps shards of them and not the whole."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import CheckpointPolicy

from cggr_compile import compat
from cggr_compile.passes.base import JointPass, PassResult
from cggr_compile.passes.fx import ancestors

if TYPE_CHECKING:
    from torch.fx import Graph, Node

    from cggr_compile.options import Options

aten = torch.ops.aten
# beside views and elementwise operators: what lays tensors out anew
LAYOUTS = frozenset(
    {
        aten._to_copy.default,
        aten.cat.default,
        aten.clone.default,
        aten.constant_pad_nd.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.stack.default,
        operator.getitem,
        torch.ops.prims.convert_element_type.default,
    }
)


class ReshardAfterForward(JointPass):
    """Tags what gathers a parameter, and what is only a layout of it, to be computed in both passes.

    Before, a partitioner that never repeats a collective keeps the full parameter from the forward pass on::

        w = wait_tensor(all_gather_into_tensor(shard, 2, group))
        y = mm(x, permute(w)); ...; dx = mm(dy, w)

    After, with the metadata of an activation checkpoint (``recompute: MUST_RECOMPUTE``) on ``all_gather_into_tensor``,
    ``wait_tensor`` and ``permute``, the cut keeps ``shard``, which is an argument of the graph anyway, and both sides
    of it gather. What is computed of a parameter and of anything else is saved or not as ever.
    """

    name = "reshard_after_forward"
    optional = True
    dense = True

    def enabled(self, options: Options) -> bool:
        return True

    def __call__(self, graph: Graph) -> PassResult:
        region, count = compat.next_checkpoint_id(), 0
        tagged: set[Node] = set()
        for node in graph.nodes:
            if node.target is compat.ALL_GATHER and (chain := _of_one_parameter(node)) is not None:
                tagged |= chain
                count += 1
            elif node.all_input_nodes and tagged.issuperset(node.all_input_nodes) and rearranges(node):
                tagged.add(node)
        for node in tagged:
            node.meta.update(recompute=CheckpointPolicy.MUST_RECOMPUTE, ac_graph_id=region)
        if not count:
            return PassResult(False, "no parameter is gathered")
        return PassResult(True, f"{count} parameters are gathered in both passes", {"gathered": count})


def _of_one_parameter(gather: Node) -> set[Node] | None:
    """What lies between a graph's argument and the gathered value, this included; None where there is more."""
    found = ancestors([gather])
    arguments = {node for node in found if node.op == "placeholder"}
    between = found - arguments - {gather}
    if len(arguments) != 1 or not all(rearranges(node) for node in between):
        return None
    return between | {gather}


def rearranges(node: Node) -> bool:
    """Whether to compute it again costs next to nothing beside a product."""
    target = node.target
    if target is compat.WAIT or target in LAYOUTS:
        return True
    if not isinstance(target, compat.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags or target.is_view
