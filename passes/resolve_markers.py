"""Gives every stop_rows marker of the joint graph its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cggr_compile.ops import UnresolvedMarkerError
from cggr_compile.passes.base import PassResult, fake_value
from cggr_compile.passes.fx import Emitter

if TYPE_CHECKING:
    from torch.fx import Graph, Node

aten = torch.ops.aten


class ResolveMarkers:
    """Turns markers into masks of the selected rows, in ATen.

    Before::

        k2 = cggr.stop_rows(k, 2); ...; h = cggr.gather_rows(x, rows, keep); ...
        dk = cggr.stop_rows_backward(dk2, 2)

    After::

        selected = zeros[B, S].scatter(1, rows, keep)
        dk = where(selected[:, None, :, None], dk2, 0.0)
    """

    name = "resolve_markers"

    def __call__(self, graph: Graph) -> PassResult:
        forward = graph.find_nodes(op="call_function", target=torch.ops.cggr.stop_rows.default)
        backward = graph.find_nodes(op="call_function", target=torch.ops.cggr.stop_rows_backward.default)
        if not forward and not backward:
            return PassResult(False, "no markers")
        gathers = graph.find_nodes(op="call_function", target=torch.ops.cggr.gather_rows.default)
        if not gathers:
            raise UnresolvedMarkerError(
                "the joint graph has stop_rows markers but no cggr::gather_rows to take rows from"
            )
        for node in forward:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        hidden, rows, keep = (n for n in gathers[0].args if isinstance(n, torch.fx.Node))
        emit = Emitter(graph, fake_value(gathers[0]).fake_mode, key="val")
        with emit.before(gathers[0], self.name):
            shape = [emit.size(hidden, 0), emit.size(hidden, 1)]
            device = fake_value(hidden).device
            blank = emit.call(aten.full.default, shape, False, dtype=torch.bool, device=device)
            selected = emit.call(aten.scatter.src, blank, 1, rows, keep)
        for node in backward:
            with emit.before(node, self.name):
                stopped = _mask(emit, node, selected)
            node.replace_all_uses_with(stopped)
            graph.erase_node(node)
        return PassResult(True, f"{len(backward)} markers resolved", {"markers": len(backward)})


def _mask(emit: Emitter, node: Node, selected: Node) -> Node:
    grad: Any = node.args[0]
    axis: Any = node.args[1]
    value = fake_value(grad)
    for _ in range(axis - 1):
        selected = emit.call(aten.unsqueeze.default, selected, 1)
    for _ in range(value.dim() - 1 - axis):
        selected = emit.call(aten.unsqueeze.default, selected, -1)
    zero = emit.call(aten.full.default, [], 0.0, dtype=value.dtype, device=value.device)
    return emit.call(aten.where.self, selected, grad, zero)
