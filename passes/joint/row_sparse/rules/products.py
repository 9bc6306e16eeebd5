"""Products of matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cggr_compile.passes.joint.row_sparse.checkpoints import only_rows_wanted
from cggr_compile.passes.joint.row_sparse.division import RowsOnly, SumOfEach
from cggr_compile.passes.joint.row_sparse.layout import Layout
from cggr_compile.passes.joint.row_sparse.plan import At, Call
from cggr_compile.passes.joint.row_sparse.rule import Rule, rule
from cggr_compile.passes.nodes import shape_of
from cggr_compile.passes.patterns.quantised import GEMM_4BIT

if TYPE_CHECKING:
    from torch.fx import Node

    from cggr_compile.passes.joint.row_sparse.annotations import Annotations
    from cggr_compile.passes.joint.row_sparse.plan import Plan
    from cggr_compile.passes.joint.row_sparse.values import RowValues

aten = torch.ops.aten
POSITIONS = ("S", "BS")


@rule(aten.bmm.default)
class Product(Rule):
    """Rows of a factor are rows of the result, unless summed over: then the result is dense, a weight's gradient."""

    def carry(self, at: Annotations, node: Node) -> Call | None:
        factors: Any = node.args
        for position in (0, 1):
            layout = at.layout_of(factors[position])
            if layout is None:
                continue
            *lead, left, right = layout
            if any(tag in POSITIONS for tag in lead):
                return None
            summed, free = (right, left) if position == 0 else (left, right)
            if summed in POSITIONS and free is None:
                return Call((At(factors[0], (*lead, None, summed)), At(factors[1], (*lead, summed, None))), None)
            other = factors[1 - position]
            if free in POSITIONS and summed is None and other not in at.layouts:
                rows = At(factors[position], layout)
                return Call((rows, other) if position == 0 else (other, rows), layout)
        return None

    def divided(self, at: Annotations, node: Node) -> Plan | None:
        """The weight's gradient from the columns of each kind; where only rows are wanted there is nothing to do."""
        factors: Any = node.args
        left, right = factors
        position = 0 if left in at.divisions else 1
        source, other = (left, right) if position == 0 else (right, left)
        division = at.divisions[source]
        free = len(division.layout) - 2 + position
        summed = division.layout[-1 - position]
        if division.axis == free and summed in POSITIONS and not any(division.layout[:-2]):
            tokens = (*division.layout[:-2], *((summed, None) if position == 0 else (None, summed)))

            def make(rv: RowValues, columns: Node, layout: Layout | None) -> Node:
                factor = rv.current(other) if layout is None else rv.rows_of(rv.current(other), tokens)
                return rv.emit.call(node.target, *((columns, factor) if position == 0 else (factor, columns)))

            return SumOfEach(source, free, make)
        return RowsOnly() if only_rows_wanted(at, node) else None

    def recompute(self, at: Annotations, node: Node, layout: Layout) -> Call | None:
        """In the forward pass the product is there already; where it is not, only its rows may be needed."""
        if "b" in layout or not only_rows_wanted(at, node):
            return None
        left, right = node.args
        if layout[-2] in POSITIONS:
            return Call((At(left, layout), right), layout)  # type: ignore[arg-type]
        if layout[-1] in POSITIONS:
            return Call((left, At(right, layout)), layout)  # type: ignore[arg-type]
        return None


@rule(aten.mm.default)
class MatrixProduct(Product):
    mixes = "features"


@rule(aten.addmm.default)
class AddedProduct(Rule):
    """b + x W of a forward pass that is computed again."""

    mixes = "features"

    def recompute(self, at: Annotations, node: Node, layout: Layout) -> Call | None:
        bias, factor, other = node.args
        if layout != ("BS", None) or len(shape_of(bias)) != 1 or not only_rows_wanted(at, node):
            return None
        return Call((bias, At(factor, layout), other), layout)  # type: ignore[arg-type]


@rule(GEMM_4BIT)
class QuantisedProduct(Rule):
    """A product of rows with a weight that stays packed. Its gradient is one with the unpacked weight, an ``mm``."""

    mixes = "features"

    def recompute(self, at: Annotations, node: Node, layout: Layout) -> Call | None:
        source, *others = node.args
        if layout[-1] is not None or not only_rows_wanted(at, node):
            return None
        return Call((At(source, layout), *others), layout)  # type: ignore[arg-type]
