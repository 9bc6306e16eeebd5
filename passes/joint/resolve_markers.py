"""Gives every detach_unselected marker of the joint graph its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cggr_compile.ops import UnresolvedMarkerError
from cggr_compile.passes.base import JointPass, PassResult
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.joint.selections import JointSelection, find_selections, selection_of
from cggr_compile.passes.nodes import fake_value

if TYPE_CHECKING:
    from torch.fx import Graph, Node

    from cggr_compile.options import Options

aten = torch.ops.aten


class ResolveMarkers(JointPass):
    """Turns markers into masks of the selected rows, in ATen.

    Before::

        k2 = cggr.detach_unselected(k, 2); ...; h = cggr.gather_rows(x, rows, keep); ...
        dk = cggr.detach_unselected_backward(dk2, 2)

    After::

        selected = zeros[B, S].scatter(1, rows, keep)
        dk = where(selected[:, None, :, None], dk2, 0.0)

    Where ``cggr.scale_selected_grads(rows, factors)`` stands, dk is multiplied with the factors as well. Of several
    selections it is the one that dk comes from.
    """

    name = "resolve_markers"

    def enabled(self, options: Options) -> bool:
        return True

    def __call__(self, graph: Graph) -> PassResult:
        forward = graph.find_nodes(op="call_function", target=torch.ops.cggr.detach_unselected.default)
        backward = graph.find_nodes(op="call_function", target=torch.ops.cggr.detach_unselected_backward.default)
        if not forward and not backward:
            return PassResult(False, "no markers")
        for node in forward:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        selections = find_selections(graph)
        masks: dict[JointSelection, tuple[Node, Node | None]] = {}
        for node in backward:
            selection = selection_of(node, selections)
            if selection is None:
                raise UnresolvedMarkerError(
                    "the joint graph has a detach_unselected marker whose gradient comes from no cggr::gather_rows, or "
                    "from one of several"
                )
            emit = Emitter(graph, fake_value(node).fake_mode, key="val")
            if selection not in masks:
                masks[selection] = self._masks(emit, selection)
            with emit.before(node, self.name):
                stopped = _mask(emit, node, *masks[selection])
            node.replace_all_uses_with(stopped)
            graph.erase_node(node)
        for node in graph.find_nodes(op="call_function", target=torch.ops.cggr.scale_selected_grads.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        return PassResult(True, f"{len(backward)} markers resolved", {"markers": len(backward)})

    def _masks(self, emit: Emitter, selection: JointSelection) -> tuple[Node, Node | None]:
        """Which positions are selected, bool [B, S], and what their gradients are multiplied with, float32 [B, S]."""
        gather = next(n for n in selection.keep.users if n.target is torch.ops.cggr.gather_rows.default)
        hidden: Any = gather.args[0]
        with emit.before(gather, self.name):
            shape = [emit.size(hidden, 0), emit.size(hidden, 1)]
            device = fake_value(hidden).device
            blank = emit.call(aten.full.default, shape, False, dtype=torch.bool, device=device)
            selected = emit.call(aten.scatter.src, blank, 1, selection.rows, selection.keep)
            if selection.factors is None:
                return selected, None
            blank = emit.call(aten.full.default, shape, 0.0, dtype=torch.float32, device=device)
            return selected, emit.call(aten.scatter.src, blank, 1, selection.rows, selection.factors)


def weighed(emit: Emitter, grad: Node, factors: Node) -> Node:
    """``grad * factors`` in the gradient's dtype; multiplied in the wider of the two."""
    dtype = fake_value(grad).dtype
    product = emit.call(aten.mul.Tensor, grad, factors)
    if fake_value(product).dtype != dtype:
        product = emit.call(torch.ops.prims.convert_element_type.default, product, dtype)
    return product


def _mask(emit: Emitter, node: Node, selected: Node, factor: Node | None) -> Node:
    grad: Any = node.args[0]
    axis: Any = node.args[1]
    rank = fake_value(grad).dim()
    stopped = emit.masked(_on_axis(emit, selected, axis, rank), grad)
    return stopped if factor is None else weighed(emit, stopped, _on_axis(emit, factor, axis, rank))


def _on_axis(emit: Emitter, tensor: Node, axis: int, rank: int) -> Node:
    """[B, S] as [B, 1, S, 1] and the like."""
    for _ in range(axis - 1):
        tensor = emit.call(aten.unsqueeze.default, tensor, 1)
    for _ in range(rank - 1 - axis):
        tensor = emit.call(aten.unsqueeze.default, tensor, -1)
    return tensor
