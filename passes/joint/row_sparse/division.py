"""A value with two kinds of columns: some are zero outside of the selected rows, the others are dense.

Such is the gradient of a fused projection to queries, keys and values, where keys and values learn from every position.
The two kinds are kept apart, as two tensors, through the views in front of the projection's products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from cggr_compile.passes.joint.row_sparse.columns import Part, columns_of
from cggr_compile.passes.joint.row_sparse.layout import Layout, regroup
from cggr_compile.passes.nodes import shape_of

if TYPE_CHECKING:
    from torch.fx import Node

    from cggr_compile.passes.joint.row_sparse.annotations import Annotations
    from cggr_compile.passes.joint.row_sparse.values import RowValues

aten = torch.ops.aten


@dataclass(frozen=True)
class Division:
    """Which columns of a value are of which kind.

    Attributes:
        layout: of the value; its tokens are on other axes than the columns.
        axis: where the columns are: ``outer`` times the same pieces, one group of heads after the other, say.
        pieces: the pieces' widths, in order, and whether they are on rows.
    """

    layout: Layout
    axis: int
    outer: int
    pieces: tuple[tuple[int, bool], ...]

    def width(self, on_rows: bool) -> int:
        """How many columns are of this kind."""
        return self.outer * sum(width for width, kind in self.pieces if kind == on_rows)

    def viewed(self, old: Sequence[int], new: Sequence[int], batch: int) -> Division | None:
        """Of a view of ``old`` as ``new``; None where the columns come to lie in several axes, or among tokens."""
        layout = regroup(old, self.layout, new, batch)
        unit = math.gcd(*(width for width, _ in self.pieces))
        inside = unit * math.prod(old[self.axis + 1 :])  # elements of a unit, in the order of the view
        whole = sum(width for width, _ in self.pieces) // unit * inside
        for axis, size in enumerate(new):
            step = math.prod(new[axis + 1 :])
            if layout is None or inside % step or (step * size) % whole or layout[axis] is not None:
                continue
            pieces = tuple((width // unit * (inside // step), kind) for width, kind in self.pieces)
            return Division(layout, axis, step * size // whole, pieces)
        return None

    def permuted(self, order: Sequence[int]) -> Division:
        """Of the value with its axes in another order."""
        return replace(self, layout=tuple(self.layout[i] for i in order), axis=list(order).index(self.axis))

    def joined(self, rv: RowValues, axis: int, rows: Node, dense: Node) -> Node:
        """One tensor of two that have the columns of each kind in ``axis``."""
        apart = {kind: self._apart(rv, value, axis, kind) for kind, value in ((True, rows), (False, dense))}
        starts = {True: 0, False: 0}
        parts = []
        for width, kind in self.pieces:
            start = starts[kind]
            starts[kind] = stop = start + width
            whole = shape_of(apart[kind])[axis + 1] == width
            parts.append(apart[kind] if whole else rv.emit.call(aten.slice.Tensor, apart[kind], axis + 1, start, stop))
        shape = list(shape_of(rows))
        shape[axis] = self.width(True) + self.width(False)
        return rv.view(rv.emit.call(aten.cat.default, parts, axis + 1), shape)

    def _apart(self, rv: RowValues, value: Node, axis: int, on_rows: bool) -> Node:
        shape = shape_of(value)
        return rv.view(value, [*shape[:axis], self.outer, self.width(on_rows) // self.outer, *shape[axis + 1 :]])


@dataclass(frozen=True)
class Divided:
    """What a divided value is: the columns on rows, laid out as the division says, and the dense ones."""

    rows: Node
    dense: Node
    division: Division


@dataclass(frozen=True)
class Divide:
    """A value put together of parts of both kinds."""

    division: Division
    parts: tuple[Part, ...]

    def results(self, node: Node) -> Mapping[Node, Division]:
        return {node: self.division}

    def apply(self, rv: RowValues, node: Node) -> None:
        layout, axis = self.division.layout, self.division.axis
        kinds: dict[bool, list[Node]] = {True: [], False: []}
        for part, (_, on_rows) in zip(self.parts, self.division.pieces, strict=True):
            seen = (*layout[:axis], *layout[axis + 1 :]) if part.flat else layout
            value = rv.rows_of(part.value, seen) if on_rows else rv.current(part.value)
            kinds[on_rows].append(rv.emit.call(aten.unsqueeze.default, value, axis) if part.flat else value)
        rows, dense = (
            parts[0] if len(parts) == 1 else rv.emit.call(aten.cat.default, parts, axis) for parts in kinds.values()
        )
        rv.divided[node] = Divided(rows, dense, self.division)
        for operand in [operand for operand in node.all_input_nodes if operand in rv.sparse]:
            node.replace_input_with(operand, rv.dense(operand))


@dataclass(frozen=True)
class Both:
    """A call on the columns of each kind; ``make`` inserts it, from the columns and the shape they get."""

    source: Node
    division: Division
    make: Callable[[RowValues, Node, list[int]], Node]

    def results(self, node: Node) -> Mapping[Node, Division]:
        return {node: self.division}

    def apply(self, rv: RowValues, node: Node) -> None:
        before, division = rv.divided[self.source], self.division
        shapes = {True: rv.at.sizes(node, division.layout), False: list(shape_of(node))}
        for on_rows, shape in shapes.items():
            shape[division.axis] = division.width(on_rows)
        rows, dense = self.make(rv, before.rows, shapes[True]), self.make(rv, before.dense, shapes[False])
        rv.divided[node] = Divided(rows, dense, division)


@dataclass(frozen=True)
class SumOfEach:
    """A call that sums over all positions, such as a weight's gradient: of each kind by itself, then one tensor.

    ``axis``: where the result has the columns. ``make`` inserts the call, from the columns of a kind and the layout of
    their tokens; None: there are all positions.
    """

    source: Node
    axis: int
    make: Callable[[RowValues, Node, Layout | None], Node]

    def results(self, node: Node) -> Mapping[Node, Division]:
        return {}

    def apply(self, rv: RowValues, node: Node) -> None:
        divided = rv.divided[self.source]
        rows = self.make(rv, divided.rows, divided.division.layout)
        dense = self.make(rv, divided.dense, None)
        rv.replace(node, divided.division.joined(rv, self.axis, rows, dense))


@dataclass(frozen=True)
class RowsOnly:
    """A call that nothing but selected rows are wanted of: these are computed where they are asked for."""

    def results(self, node: Node) -> Mapping[Node, Any]:
        return {}

    def apply(self, rv: RowValues, node: Node) -> None:
        pass


def divide(at: Annotations, node: Node) -> Divide | None:
    """What becomes of a call that puts parts on rows and dense parts together; None if it is none."""
    columns = columns_of(node)
    if columns is None or not columns.covers(shape_of(node)[columns.axis]):
        return None
    kinds = [at.layout_of(part.value) for part in columns.parts]
    layouts = {
        (*layout[: columns.axis], None, *layout[columns.axis :]) if part.flat else layout
        for part, layout in zip(columns.parts, kinds, strict=True)
        if layout is not None
    }
    if len(layouts) != 1 or None not in kinds or any(part.value in at.divisions for part in columns.parts):
        return None
    (layout,) = layouts
    if layout[columns.axis] is not None:
        return None
    pieces = tuple((part.width, kind is not None) for part, kind in zip(columns.parts, kinds, strict=True))
    return Divide(Division(layout, columns.axis, 1, pieces), columns.parts)
