"""Where rows begin: the gradient of the loss, and every place where the gradient of unselected positions ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.joint.resolve_markers import weighed
from cggr_compile.passes.joint.row_sparse.plan import At, Call
from cggr_compile.passes.joint.row_sparse.rule import Rule, rule
from cggr_compile.passes.nodes import shape_of

if TYPE_CHECKING:
    from torch.fx import Node

    from cggr_compile.passes.joint.row_sparse.annotations import Annotations
    from cggr_compile.passes.joint.row_sparse.values import RowValues

ops = torch.ops.cggr


@rule(ops.scatter_rows.default)
class ScatterRows(Rule):
    """The gradient of the gather in front of the loss: its rows are there."""

    begins = True

    def carry(self, at: Annotations, node: Node) -> Call:
        layout = at.layout("B", "S", None)
        return Call((node.args[0],), layout, make=lambda rv, values: rv.zero_unused_slots(values, layout))


@rule(ops.detach_unselected_backward.default)
class DetachUnselected(Rule):
    """The gradient on the selected rows, weighed, nothing elsewhere."""

    begins = True

    def carry(self, at: Annotations, node: Node) -> Call:
        grad: Any = node.args[0]
        axis: Any = node.args[1]
        layout = at.layout(*("B" if i == 0 else "S" if i == axis else None for i in range(len(shape_of(node)))))
        known = at.layout_of(grad) == layout

        def make(rv: RowValues, rows: Node) -> Node:
            values = rows if known else rv.zero_unused_slots(rows, layout)
            if rv.factors is None:
                return values
            return weighed(rv.emit, values, rv.on_slots(rv.factors, layout, values))

        return Call((At(grad, layout),), layout, make)
