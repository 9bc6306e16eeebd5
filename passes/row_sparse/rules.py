"""How a value that is zero outside the selected rows goes through an operator.

A rule returns the result's rows, an ordinary dense node (a contraction over all tokens), or None: not handled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from cggr_compile.passes.base import fake_value, shape_of
from cggr_compile.passes.row_sparse.layout import Layout, positions_first, regroup, resize, token_axes
from cggr_compile.passes.row_sparse.values import Rows, RowValues

if TYPE_CHECKING:
    from typing import TypeAlias

aten = torch.ops.aten
prims = torch.ops.prims
Result: TypeAlias = "Rows | Node | None"
Rule: TypeAlias = Callable[[RowValues, Node], Result]


def _sparse(rv: RowValues, value: Any) -> Rows | None:
    return rv.sparse.get(value) if isinstance(value, Node) else None


def _is_zeros(value: Any) -> bool:
    return bool(isinstance(value, Node) and value.target is aten.full.default and value.args[1] == 0)


def _spans(value: Any, layout: Layout, node: Node) -> bool:
    """Whether an operand has the result's token axes in full (it may broadcast along the others)."""
    mine, result = shape_of(value), shape_of(node)
    return len(mine) == len(result) and all(mine[a] == result[a] for a in token_axes(layout))


def linear_in_first(rv: RowValues, node: Node) -> Result:
    """f(g, ...) elementwise with f(0, ...) = 0: negation, casts, products, quotients, gradients of activations."""
    grad = _sparse(rv, node.args[0])
    if grad is None or not _spans(node.args[0], grad.layout, node):
        return None
    operands = rv.aligned(node, grad.layout)
    return None if operands is None else Rows(rv.emit.call(node.target, *operands, **node.kwargs), grad.layout)


def product(rv: RowValues, node: Node) -> Result:
    """g * x with either factor sparse."""
    for position in (0, 1):
        grad = _sparse(rv, node.args[position])
        if grad is not None and _spans(node.args[position], grad.layout, node):
            operands = rv.aligned(node, grad.layout)
            return None if operands is None else Rows(rv.emit.call(node.target, *operands), grad.layout)
    return None


def addition(rv: RowValues, node: Node) -> Result:
    left, right = _sparse(rv, node.args[0]), _sparse(rv, node.args[1])
    if left and right and left.layout == right.layout and _spans(node.args[0], left.layout, node):
        return Rows(rv.emit.call(node.target, left.values, right.values, **node.kwargs), left.layout)
    if left and _is_zeros(node.args[1]) and shape_of(node.args[0]) == shape_of(node):
        return left
    if (
        right
        and _is_zeros(node.args[0])
        and node.target is aten.add.Tensor
        and shape_of(node.args[1]) == shape_of(node)
    ):
        return right
    return None


def choice(rv: RowValues, node: Node) -> Result:
    """where(c, g, 0) and where(c, 0, g)."""
    _, yes, no = node.args
    grad = _sparse(rv, yes) or _sparse(rv, no)
    both = _sparse(rv, yes) and _sparse(rv, no)
    other = no if _sparse(rv, yes) else yes
    if grad is None or shape_of(yes if _sparse(rv, yes) else no) != shape_of(node):
        return None
    if not both and not _is_zeros(other) and not _is_zero_scalar(other):
        return None
    operands = rv.aligned(node, grad.layout)
    return None if operands is None else Rows(rv.emit.call(node.target, *operands), grad.layout)


def _is_zero_scalar(value: Any) -> bool:
    return bool(isinstance(value, Node) and value.target is aten.scalar_tensor.default and value.args[0] == 0)


def view(rv: RowValues, node: Node) -> Result:
    grad = rv.sparse[_first(node)]
    layout = regroup(shape_of(node.args[0]), grad.layout, shape_of(node), rv.batch)
    if layout is None:
        return None
    return Rows(rv.view(grad.values, resize(shape_of(node), layout, rv.batch, rv.slots)), layout)


def permute(rv: RowValues, node: Node) -> Result:
    grad = rv.sparse[_first(node)]
    order: Any = node.args[1]
    layout = tuple(grad.layout[axis] for axis in order)
    if positions_first(layout):
        return None
    return Rows(rv.emit.call(node.target, grad.values, order), layout)


def unsqueeze(rv: RowValues, node: Node) -> Result:
    grad = rv.sparse[_first(node)]
    axis: Any = node.args[1]
    axis %= len(grad.layout) + 1
    layout = (*grad.layout[:axis], None, *grad.layout[axis:])
    return Rows(rv.emit.call(node.target, grad.values, axis), layout)


def squeeze(rv: RowValues, node: Node) -> Result:
    grad = rv.sparse[_first(node)]
    axes: Any = node.args[1]
    axes = {axis % len(grad.layout) for axis in (axes if isinstance(axes, (list, tuple)) else [axes])}
    if any(grad.layout[axis] for axis in axes):
        return None
    layout = tuple(tag for axis, tag in enumerate(grad.layout) if axis not in axes)
    return Rows(rv.emit.call(node.target, grad.values, node.args[1]), layout)


def expand(rv: RowValues, node: Node) -> Result:
    grad = rv.sparse[_first(node)]
    lead = len(shape_of(node)) - len(grad.layout)
    layout: Layout = (*([None] * lead), *grad.layout)
    return Rows(rv.emit.call(node.target, grad.values, resize(shape_of(node), layout, rv.batch, rv.slots)), layout)


def narrow(rv: RowValues, node: Node) -> Result:
    """slice, select, split along an axis that is no token axis; a slice that takes everything anywhere."""
    grad = rv.sparse[_first(node)]
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    if node.target is aten.split_with_sizes.default:
        axis = node.args[2] if len(node.args) > 2 else 0
    axis %= len(grad.layout)
    if grad.layout[axis] is not None:
        return grad if node.target is aten.slice.Tensor and shape_of(node) == shape_of(node.args[0]) else None
    values = rv.emit.call(node.target, grad.values, *node.args[1:])
    dropped = node.target is aten.select.int
    layout = grad.layout[:axis] + grad.layout[axis + 1 :] if dropped else grad.layout
    return Rows(values, layout)


def item(rv: RowValues, node: Node) -> Result:
    grad = rv.sparse[_first(node)]
    return Rows(rv.emit.call(node.target, grad.values, node.args[1]), grad.layout)


def concatenate(rv: RowValues, node: Node) -> Result:
    parts: Any = node.args[0]
    found = [rv.sparse.get(part) for part in parts]
    first = next(rows for rows in found if rows is not None)
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    if first.layout[axis % len(first.layout)] is not None:
        return None
    values = []
    for part, rows in zip(parts, found, strict=True):
        if rows is None and not _is_zeros(part):
            return None
        if rows is not None and rows.layout != first.layout:
            return None
        values.append(rows.values if rows else rv.version(part, first.layout))
    return Rows(rv.emit.call(node.target, values, axis), first.layout)


def place(rv: RowValues, node: Node) -> Result:
    """slice_scatter(zeros, g, axis, ...): the gradient of a slice."""
    grad = _sparse(rv, node.args[1])
    axis: Any = node.args[2] if len(node.args) > 2 else 0
    if grad is None or not _is_zeros(node.args[0]) or grad.layout[axis % len(grad.layout)] is not None:
        return None
    zeros = _zeros(rv, node, grad.layout)
    return Rows(rv.emit.call(node.target, zeros, grad.values, *node.args[2:]), grad.layout)


def place_at_index(rv: RowValues, node: Node) -> Result:
    """index_put(zeros, [None, ..., ids], g): the gradient of taking some columns."""
    arguments: Any = node.args
    table, (*whole, index), values, *rest = arguments
    grad = _sparse(rv, values)
    if grad is None or not _is_zeros(table) or any(i is not None for i in whole) or index is None:
        return None
    axis, after = len(whole), len(whole) + len(shape_of(index))
    columns, layout = grad.layout[axis:after], (*grad.layout[:axis], None, *grad.layout[after:])
    if any(columns) or len(layout) != len(shape_of(node)):
        return None
    return Rows(rv.emit.call(node.target, _zeros(rv, node, layout), [*whole, index], grad.values, *rest), layout)


def scatter_columns(rv: RowValues, node: Node) -> Result:
    """scatter(zeros, axis, index, g), adding or not: the gradient of the top-k, or of other columns, of every token."""
    table, axis, index, values = node.args
    grad = _sparse(rv, values)
    if grad is None or not _is_zeros(table) or grad.layout[axis] is not None or not isinstance(index, Node):  # type: ignore[index]
        return None
    if not _spans(index, grad.layout, node) or not _spans(values, grad.layout, node):
        return None
    zeros, columns = _zeros(rv, node, grad.layout), rv.version(index, grad.layout)
    return Rows(rv.emit.call(node.target, zeros, axis, columns, grad.values), grad.layout)


def _zeros(rv: RowValues, node: Node, layout: Layout) -> Node:
    value = fake_value(node)
    shape = resize(value.shape, layout, rv.batch, rv.slots)
    return rv.emit.call(aten.full.default, shape, 0, dtype=value.dtype, device=value.device, pin_memory=False)


def pad(rv: RowValues, node: Node) -> Result:
    """Zeros added to, or columns cut off, axes without tokens."""
    grad = rv.sparse[_first(node)]
    widths: Any = node.args[1]  # two per axis, from the last one on
    value: Any = node.args[2] if len(node.args) > 2 else 0
    padded = [axis for axis in range(len(grad.layout)) if any(widths[2 * axis : 2 * axis + 2])]
    if value != 0 or any(grad.layout[-1 - axis] for axis in padded):
        return None
    return Rows(rv.emit.call(node.target, grad.values, widths), grad.layout)


def reduction(rv: RowValues, node: Node) -> Result:
    """Sums over other axes keep the rows; sums over all tokens contract to a dense tensor."""
    grad = rv.sparse[_first(node)]
    tokens = set(token_axes(grad.layout))
    if node.target is aten.sum.default:
        return rv.emit.call(node.target, grad.values, **node.kwargs)
    rank = len(grad.layout)
    axes: Any = node.args[1] if len(node.args) > 1 else None
    reduced = {axis % rank for axis in axes} if axes else set(range(rank))
    if tokens <= reduced:
        if node.target is aten.mean.dim:
            return None
        return rv.emit.call(node.target, grad.values, *node.args[1:], **node.kwargs)
    if tokens & reduced:
        return None
    keep = bool(node.args[2]) if len(node.args) > 2 else False
    layout = tuple(tag for axis, tag in enumerate(grad.layout) if keep or axis not in reduced)
    return Rows(rv.emit.call(node.target, grad.values, *node.args[1:], **node.kwargs), layout)


def matmul(rv: RowValues, node: Node) -> Result:
    """Products of matrices, and of batches of them: rows of a factor are rows of the result, unless summed over."""
    for position in (0, 1):
        a: Any = node.args[0]
        b: Any = node.args[1]
        grad = _sparse(rv, node.args[position])
        if grad is None:
            continue
        *lead, left, right = grad.layout
        if any(tag in ("S", "BS") for tag in lead):
            return None
        summed, free = (right, left) if position == 0 else (left, right)
        if summed in ("S", "BS") and free is None:
            columns, rows = (*lead, None, summed), (*lead, summed, None)
            return rv.emit.call(node.target, rv.version(a, columns), rv.version(b, rows))
        other = b if position == 0 else a
        if free in ("S", "BS") and summed is None and other not in rv.sparse:
            factors = (grad.values, b) if position == 0 else (a, grad.values)
            return Rows(rv.emit.call(node.target, *factors), grad.layout)
    return None


def fused_multiply_add(rv: RowValues, node: Node) -> Result:
    """x * g + h, which ends the backward of softmax."""
    _, factor, term = node.args
    left, right = _sparse(rv, factor), _sparse(rv, term)
    if left is None or right is None or left.layout != right.layout or not _spans(factor, right.layout, node):
        return None
    operands = rv.aligned(node, right.layout)
    return None if operands is None else Rows(rv.emit.call(node.target, *operands), right.layout)


def embedding(rv: RowValues, node: Node) -> Result:
    """The table's gradient: only the selected rows' tokens get one."""
    grad = _sparse(rv, node.args[0])
    if grad is None or grad.layout[-1] is not None:
        return None
    index: Any = node.args[1]
    return rv.emit.call(node.target, grad.values, rv.version(index, grad.layout[:-1]), *node.args[2:])


def accumulate(rv: RowValues, node: Node) -> Result:
    """index_put(table, [ids], g, accumulate) and its masked form: what the embedding's gradient decomposes to."""
    masked = node.target is aten._unsafe_masked_index_put_accumulate.default
    table, *rest = node.args
    mask, indices, values = rest if masked else (None, rest[0], rest[1])
    grad = _sparse(rv, values)
    if grad is None or (not masked and not (len(rest) > 2 and rest[2])):
        return None
    if not isinstance(indices, (list, tuple)) or len(indices) != 1 or indices[0] is None:
        return None
    (index,) = indices
    ids = len(shape_of(index))
    if any(axis >= ids for axis in token_axes(grad.layout)):
        return None
    rows = rv.version(index, grad.layout[:ids])  # type: ignore[arg-type]
    if masked:
        lead = grad.layout[: len(shape_of(mask))]
        return rv.emit.call(node.target, table, rv.version(mask, lead), [rows], grad.values)  # type: ignore[arg-type]
    return rv.emit.call(node.target, table, [rows], grad.values, True)


def _first(node: Node) -> Node:
    return node.args[0]  # type: ignore[return-value]


RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        (
            *(aten.neg.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.mul.Scalar),
            *(aten.div.Scalar, aten.div.Tensor, prims.convert_element_type.default, aten._to_copy.default),
            *(aten.threshold_backward.default, aten.gelu_backward.default, aten.silu_backward.default),
            *(aten.tanh_backward.default, aten.sigmoid_backward.default),
        ),
        linear_in_first,
    ),
    aten.mul.Tensor: product,
    aten.add.Tensor: addition,
    aten.sub.Tensor: addition,
    aten.where.self: choice,
    aten.view.default: view,
    aten._unsafe_view.default: view,
    aten.permute.default: permute,
    aten.unsqueeze.default: unsqueeze,
    aten.squeeze.dim: squeeze,
    aten.squeeze.dims: squeeze,
    aten.expand.default: expand,
    aten.slice.Tensor: narrow,
    aten.select.int: narrow,
    aten.cat.default: concatenate,
    aten.slice_scatter.default: place,
    aten.constant_pad_nd.default: pad,
    aten.scatter.src: scatter_columns,
    aten.scatter_add.default: scatter_columns,
    aten.sum.dim_IntList: reduction,
    aten.sum.default: reduction,
    aten.mean.dim: reduction,
    aten.mm.default: matmul,
    aten.bmm.default: matmul,
    aten.embedding_dense_backward.default: embedding,
    aten._unsafe_masked_index_put_accumulate.default: accumulate,
    aten.index_put.default: lambda rv, node: accumulate(rv, node) or place_at_index(rv, node),
}
# operators that torch._inductor registers, which is not imported with this module
LATE_RULES: dict[str, Rule] = {"prims.fma.default": fused_multiply_add}
