"""Adds the few rows of an embedding's gradient where they belong, without a table of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cggr_compile.passes.base import JointPass, PassResult
from cggr_compile.passes.fx import Emitter, is_static, is_zeros
from cggr_compile.passes.nodes import fake_value, shape_of

if TYPE_CHECKING:
    from torch.fx import Graph, Node

aten = torch.ops.aten
# the gradient of a lookup, as releases of PyTorch write it
MASKED, UNMASKED = aten._unsafe_masked_index_put_accumulate.default, aten.index_put.default
CAST = torch.ops.prims.convert_element_type.default


@dataclass(frozen=True)
class TableGradient:
    """``result = table + cast(zeros[V, H] with values added to rows)``.

    Attributes:
        mask: bool [..., 1], which of the rows count; None: all of them.
        index: int64 [...], the rows. values: [..., H], what is added to each.
        table: [V, H]; None where there is nothing to add to.
    """

    mask: Node | None
    index: Node
    values: Node
    table: Node | None
    result: Node


class AddTableRows(JointPass):
    """Adds the gradient of a few looked-up rows to what the table's gradient is besides: the head's, if it is tied.

    Before::

        rows = zeros[V, H], float32; rows[ids] += g          # [B, K, H]
        dW = dW_head + rows.to(bfloat16)

    After, ``once`` [B * K, H] holds the sum for every token, in float32::

        slot[ids] = arange(B * K)                            # one of the places where a token stands
        once = zeros[B * K, H]; once[slot[ids]] += g
        dW = dW_head.index_put([ids], dW_head[ids] + once[slot[ids]])      # Inductor: in place

    The same numbers, rounded once less; in one dtype the rows are simply added to ``dW_head``. A table of zeros in
    float32 is several times what the backward of a few rows needs besides: at the end, when every weight has its
    gradient, it would be the peak of the memory.
    """

    name = "add_table_rows"
    optional = True

    def __call__(self, graph: Graph) -> PassResult:
        writes = [node for node in graph.nodes if node.target in (MASKED, UNMASKED)]
        found = [gradient for write in writes if (gradient := _read(write)) is not None]
        for gradient in found:
            _replace(graph, gradient)
        if not found:
            return PassResult(False, "no gradient of few rows of a table")
        graph.eliminate_dead_code()
        added = sum(gradient.table is not None for gradient in found)
        return PassResult(True, f"few rows of {len(found)} tables, {added} of them added to another gradient")


def _read(write: Node) -> TableGradient | None:
    arguments: Any = write.args
    if write.target is MASKED:
        zeros, mask, indices, values = arguments
    else:
        zeros, indices, values, *accumulate = arguments
        mask = None
        if accumulate != [True]:
            return None
    if not is_zeros(zeros) or len(indices) != 1 or len(shape_of(write)) != 2 or not is_static(write, values):
        return None
    (index,) = indices
    if index is None or fake_value(index).numel() >= shape_of(write)[0]:
        return None  # as many rows as the table has
    if shape_of(values) != (*shape_of(index), shape_of(write)[1]):
        return None
    if mask is not None and shape_of(mask) != (*shape_of(index), 1):
        return None
    cast = _only_user(write)
    result = cast if cast is not None and cast.target is CAST else write
    total = _only_user(result)
    if total is not None and total.target is aten.add.Tensor and not total.kwargs:
        others: Any = [node for node in total.args if node is not result]
        if len(others) == 1 and _alike(others[0], result) and _alike(total, result):
            return TableGradient(mask, index, values, others[0], total)
    return TableGradient(mask, index, values, None, result) if result is not write else None


def _alike(node: Node, other: Node) -> bool:
    return shape_of(node) == shape_of(other) and fake_value(node).dtype == fake_value(other).dtype


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _replace(graph: Graph, gradient: TableGradient) -> None:
    wanted = fake_value(gradient.result)
    emit = Emitter(graph, wanted.fake_mode, key="val")
    with emit.before(gradient.result, AddTableRows.name):
        table, operands = gradient.table, [gradient.index, gradient.values]
        if table is None:
            shape = list(wanted.shape)
            table = emit.call(aten.full.default, shape, 0, dtype=wanted.dtype, device=wanted.device)
        if gradient.mask is not None:
            operands = list(emit.trace(without_masked, gradient.mask, *operands))
        total = emit.trace(add_table_rows, table, *operands)
    gradient.result.replace_all_uses_with(total)


def without_masked(mask: Tensor, index: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """``index`` [...] and ``values`` [..., H] that add nothing, to any row, where ``mask`` [..., 1] is False."""
    return torch.where(mask[..., 0], index, 0), torch.where(mask, values, 0.0)


def add_table_rows(table: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``table`` [V, H] with ``values`` [..., H] added to its rows ``index`` [...]."""
    ids, rows = index.flatten(), values.flatten(0, -2)
    if table.dtype == rows.dtype:
        return aten.index_put(table, [ids], rows, True)  # type: ignore[no-any-return]
    places = torch.arange(ids.shape[0], device=ids.device)
    slots = aten.index_put(ids.new_zeros(table.shape[0]), [ids], places)[ids]
    once = aten.index_put(torch.zeros_like(rows), [slots], rows, True)
    total = (table[ids] + once[slots]).to(table.dtype)
    # rows are read before any is written, and those that stand for one token are equal
    written: Tensor = aten.index_put(table, [ids], torch.ops.cggr.fusion_barrier(total))
    return written
