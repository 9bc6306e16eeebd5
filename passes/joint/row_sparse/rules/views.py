"""Operators that rearrange axes. What each does to a layout is written once per direction, side by side.

``OpOverload.is_view`` says that an operator is one of these, but not what it does to a layout. Strides would say it for
all of them at once, but for axes of size 1, which have none and may be what carries a tag.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from cggr_compile.passes.fx import is_zeros
from cggr_compile.passes.joint.row_sparse.division import Both, divide
from cggr_compile.passes.joint.row_sparse.layout import Layout, positions_first, regroup
from cggr_compile.passes.joint.row_sparse.plan import At, Call
from cggr_compile.passes.joint.row_sparse.rule import Rule, rule
from cggr_compile.passes.nodes import argument, shape_of

if TYPE_CHECKING:
    from cggr_compile.passes.joint.row_sparse.annotations import Annotations
    from cggr_compile.passes.joint.row_sparse.plan import Plan

aten = torch.ops.aten


class View(Rule, ABC):
    """A view of the first argument, told by what it does to a layout."""

    @abstractmethod
    def result(self, at: Annotations, node: Node, layout: Layout) -> Layout | None:
        """Of the view of a value laid out as ``layout``; None where positions are mixed with other axes."""

    def source(self, at: Annotations, node: Node, layout: Layout) -> Layout | None:
        """Of the value whose view is laid out as ``layout``; None where rows are better gathered from the view."""
        return None

    def call(self, at: Annotations, node: Node, source: At, layout: Layout) -> Call:
        return Call((source, *node.args[1:]), layout)

    def carry(self, at: Annotations, node: Node) -> Call | None:
        source = first(node)
        layout = self.result(at, node, at.layouts[source])
        return None if layout is None else self.call(at, node, At(source, at.layouts[source]), layout)

    def recompute(self, at: Annotations, node: Node, layout: Layout) -> Call | None:
        before = self.source(at, node, layout)
        return None if before is None else self.call(at, node, At(first(node), before), layout)

    def _viewed(self, at: Annotations, node: Node) -> Both | None:
        """The columns of each kind viewed, where the columns stay in one axis."""
        source = first(node)
        division = at.divisions[source].viewed(shape_of(source), shape_of(node), at.batch)
        return None if division is None else Both(source, division, lambda rv, part, shape: rv.view(part, shape))


def first(node: Node) -> Node:
    return node.args[0]  # type: ignore[return-value]


@rule(aten.view.default, aten._unsafe_view.default)
class Reshape(View):
    mixes = "nothing"

    def result(self, at: Annotations, node: Node, layout: Layout) -> Layout | None:
        return regroup(shape_of(first(node)), layout, shape_of(node), at.batch)

    def source(self, at: Annotations, node: Node, layout: Layout) -> Layout | None:
        return None if "b" in layout else regroup(shape_of(node), layout, shape_of(first(node)), at.batch)

    def call(self, at: Annotations, node: Node, source: At, layout: Layout) -> Call:
        return Call((source, at.sizes(node, layout)), layout, make=lambda rv, rows, shape: rv.view(rows, shape))

    divided = View._viewed


@rule(aten.permute.default)
class Permute(View):
    mixes = "nothing"

    def divided(self, at: Annotations, node: Node) -> Both | None:
        source, order = first(node), self._order(node)
        division = at.divisions[source].permuted(order)
        if _gatherable(division.layout) is None:
            return None
        return Both(source, division, lambda rv, part, _: rv.emit.call(node.target, part, order))

    def result(self, at: Annotations, node: Node, layout: Layout) -> Layout | None:
        return _gatherable(tuple(layout[axis] for axis in self._order(node)))

    def source(self, at: Annotations, node: Node, layout: Layout) -> Layout | None:
        order = self._order(node)
        return _gatherable(tuple(layout[order.index(i)] for i in range(len(layout))))

    def _order(self, node: Node) -> list[int]:
        order: Any = node.args[1]
        return [axis % len(order) for axis in order]  # tensordot counts some from behind


def _gatherable(layout: Layout) -> Layout | None:
    return None if positions_first(layout) else layout


@rule(aten.unsqueeze.default)
class Unsqueeze(View):
    mixes = "nothing"

    def result(self, at: Annotations, node: Node, layout: Layout) -> Layout | None:
        axis = self._axis(node)
        return (*layout[:axis], None, *layout[axis:])

    def source(self, at: Annotations, node: Node, layout: Layout) -> Layout | None:
        axis = self._axis(node)
        return layout[:axis] + layout[axis + 1 :] if layout[axis] is None else None

    def call(self, at: Annotations, node: Node, source: At, layout: Layout) -> Call:
        return Call((source, self._axis(node)), layout)

    divided = View._viewed

    def _axis(self, node: Node) -> int:
        axis: Any = node.args[1]
        return int(axis) % len(shape_of(node))


@rule(aten.squeeze.dim, aten.squeeze.dims)
class Squeeze(View):
    def result(self, at: Annotations, node: Node, layout: Layout) -> Layout | None:
        axes: Any = node.args[1]
        axes = {axis % len(layout) for axis in (axes if isinstance(axes, (list, tuple)) else [axes])}
        if any(layout[axis] for axis in axes):
            return None
        return tuple(tag for axis, tag in enumerate(layout) if axis not in axes)

    divided = View._viewed


@rule(aten.expand.default)
class Expand(View):
    mixes = "nothing"

    def result(self, at: Annotations, node: Node, layout: Layout) -> Layout | None:
        return (*[None] * (len(shape_of(node)) - len(layout)), *layout)

    def call(self, at: Annotations, node: Node, source: At, layout: Layout) -> Call:
        return Call((source, at.sizes(node, layout)), layout)

    def recompute(self, at: Annotations, node: Node, layout: Layout) -> Call | None:
        source = None if "b" in layout else at.operand(first(node), layout, shape_of(node))
        return None if source is None else self.call(at, node, source, layout)


@rule(aten.slice.Tensor, aten.select.int)
class SliceOrSelect(Rule):
    """Along an axis that is no token axis; a slice that takes everything along any.

    Rows of a slice are gathered from the slice: the rest of these rows may not be wanted at all.
    """

    def carry(self, at: Annotations, node: Node) -> Call | None:
        source = first(node)
        layout = at.layouts[source]
        axis = argument(node, 1, "dim", 0) % len(layout)
        if layout[axis] is not None:
            whole = node.target is aten.slice.Tensor and shape_of(node) == shape_of(source)
            return Call((At(source, layout),), layout, make=lambda rv, rows: rows) if whole else None
        result = layout[:axis] + layout[axis + 1 :] if node.target is aten.select.int else layout
        return Call((At(source, layout), *node.args[1:]), result)


@rule(aten.cat.default)
class Concatenate(Rule):
    """Along an axis that is no token axis: of sparse values and zeros, or of dense parts as well."""

    def carry(self, at: Annotations, node: Node) -> Plan | None:
        return self._sparse(at, node) or divide(at, node)

    def _sparse(self, at: Annotations, node: Node) -> Call | None:
        parts: Any = node.args[0]
        (layout, *others) = {at.layouts[part]: None for part in parts if part in at.layouts}
        axis: Any = node.args[1] if len(node.args) > 1 else 0
        if others or layout[axis % len(layout)] is not None:
            return None
        if not all(part in at.layouts or is_zeros(part) for part in parts):
            return None
        return Call(([At(part, layout) for part in parts], axis), layout)


@rule(aten.constant_pad_nd.default)
class Pad(Rule):
    """Zeros added to, or columns cut off, axes without tokens."""

    def carry(self, at: Annotations, node: Node) -> Call | None:
        layout = at.layouts[first(node)]
        widths: Any = node.args[1]  # two per axis, from the last one on
        value: Any = node.args[2] if len(node.args) > 2 else 0
        padded = [axis for axis in range(len(layout)) if any(widths[2 * axis : 2 * axis + 2])]
        if value != 0 or any(layout[-1 - axis] for axis in padded):
            return None
        return Call((At(first(node), layout), widths), layout)


@rule(aten.full.default)
class Full(Rule):
    def recompute(self, at: Annotations, node: Node, layout: Layout) -> Call | None:
        return None if "b" in layout else Call((at.sizes(node, layout), *node.args[1:]), layout)
