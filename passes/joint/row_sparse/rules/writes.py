"""Gradients of reading a part: they write rows into zeros, or into a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from cggr_compile.passes.fx import is_zeros
from cggr_compile.passes.joint.row_sparse.layout import token_axes
from cggr_compile.passes.joint.row_sparse.plan import At, Call, ZerosAt
from cggr_compile.passes.joint.row_sparse.rule import Rule, rule
from cggr_compile.passes.nodes import shape_of

if TYPE_CHECKING:
    from cggr_compile.passes.joint.row_sparse.annotations import Annotations

aten = torch.ops.aten


@rule(aten.slice_scatter.default)
class SliceScatter(Rule):
    """slice_scatter(zeros, g, axis, ...): the gradient of a slice."""

    def carry(self, at: Annotations, node: Node) -> Call | None:
        zeros, values, *rest = node.args
        layout = at.layout_of(values)
        axis: Any = rest[0] if rest else 0
        if layout is None or not is_zeros(zeros) or layout[axis % len(layout)] is not None:
            return None
        return Call((ZerosAt(node, layout), At(values, layout), *rest), layout)  # type: ignore[arg-type]


@rule(aten.select_scatter.default)
class SelectScatter(Rule):
    """select_scatter(zeros, g, axis, i): the gradient of taking one column."""

    def carry(self, at: Annotations, node: Node) -> Call | None:
        arguments: Any = node.args
        zeros, values, axis, index = arguments
        layout = at.layout_of(values)
        if layout is None or not is_zeros(zeros):
            return None
        axis %= len(shape_of(node))
        result = (*layout[:axis], None, *layout[axis:])
        return Call((ZerosAt(node, result), At(values, layout), axis, index), result)


@rule(aten.scatter.src, aten.scatter_add.default)
class ScatterColumns(Rule):
    """scatter(zeros, axis, index, g), adding or not: the gradient of the top-k, or of other columns, of every token."""

    def carry(self, at: Annotations, node: Node) -> Call | None:
        arguments: Any = node.args
        zeros, axis, index, values = arguments
        layout = at.layout_of(values)
        if layout is None or not is_zeros(zeros) or layout[axis] is not None or not isinstance(index, Node):
            return None
        full = [shape_of(node)[a] for a in token_axes(layout)]
        for operand in (index, values):
            shape = shape_of(operand)
            if len(shape) != len(layout) or [shape[a] for a in token_axes(layout)] != full:
                return None
        return Call((ZerosAt(node, layout), axis, At(index, layout), At(values, layout)), layout)


@rule(aten.index_put.default)
class IndexPut(Rule):
    """index_put(table, [ids], g, True), the embedding's gradient, or index_put(zeros, [None, ..., columns], g)."""

    def carry(self, at: Annotations, node: Node) -> Call | None:
        return self._into_table(at, node) or self._columns(at, node)

    def _into_table(self, at: Annotations, node: Node) -> Call | None:
        arguments: Any = node.args
        table, indices, values, *rest = arguments
        operands = added_to_table(at, indices, values) if rest and rest[0] else None
        return None if operands is None else Call((table, *operands, True), None)

    def _columns(self, at: Annotations, node: Node) -> Call | None:
        """The gradient of taking some columns."""
        arguments: Any = node.args
        zeros, (*whole, index), values, *rest = arguments
        found = at.layout_of(values)
        if found is None or not is_zeros(zeros) or any(i is not None for i in whole) or index is None:
            return None
        axis, after = len(whole), len(whole) + len(shape_of(index))
        layout = (*found[:axis], None, *found[after:])
        if any(found[axis:after]) or len(layout) != len(shape_of(node)):
            return None
        return Call((ZerosAt(node, layout), [*whole, index], At(values, found), *rest), layout)


@rule(aten._unsafe_masked_index_put_accumulate.default)
class MaskedIndexPut(Rule):
    """The embedding's gradient without the padding's."""

    def carry(self, at: Annotations, node: Node) -> Call | None:
        arguments: Any = node.args
        table, mask, indices, values = arguments
        operands = added_to_table(at, indices, values)
        if operands is None:
            return None
        lead = at.layouts[values][: len(shape_of(mask))]
        return Call((table, At(mask, lead), *operands), None)


def added_to_table(at: Annotations, indices: Any, values: Any) -> tuple[Any, Any] | None:
    """The rows of ``values``, and which rows of a table they are added to."""
    layout = at.layout_of(values)
    if layout is None or not isinstance(indices, (list, tuple)) or len(indices) != 1 or indices[0] is None:
        return None
    (index,) = indices
    ids = len(shape_of(index))
    if any(axis >= ids for axis in token_axes(layout)):
        return None
    return [At(index, layout[:ids])], At(values, layout)


@rule(aten.embedding_dense_backward.default)
class EmbeddingBackward(Rule):
    """The table's gradient: only the selected rows' tokens get one."""

    def carry(self, at: Annotations, node: Node) -> Call | None:
        arguments: Any = node.args
        grad, index, *rest = arguments
        layout = at.layout_of(grad)
        if layout is None or layout[-1] is not None:
            return None
        return Call((At(grad, layout), At(index, layout[:-1]), *rest), None)
