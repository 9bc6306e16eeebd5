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
ADD_ROWS = aten._unsafe_masked_index_put_accumulate.default
CAST = torch.ops.prims.convert_element_type.default


@dataclass(frozen=True)
class TableGradient:
    """``result = table + cast(zeros[V, H] with rows added)``; ``table`` is None where there is nothing to add to."""

    write: Node
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
        found = [
            gradient for node in graph.find_nodes(op="call_function", target=ADD_ROWS) if (gradient := _read(node))
        ]
        for gradient in found:
            _replace(graph, gradient)
        if not found:
            return PassResult(False, "no gradient of few rows of a table")
        graph.eliminate_dead_code()
        added = sum(gradient.table is not None for gradient in found)
        return PassResult(True, f"few rows of {len(found)} tables, {added} of them added to another gradient")


def _read(write: Node) -> TableGradient | None:
    arguments: Any = write.args
    zeros, mask, (index, *more), values = arguments
    if not is_zeros(zeros) or more or not is_static(write, values, index) or len(shape_of(write)) != 2:
        return None
    if fake_value(index).numel() >= shape_of(write)[0]:
        return None  # as many rows as the table has
    if shape_of(values) != (*shape_of(index), shape_of(write)[1]) or len(shape_of(mask)) != len(shape_of(values)):
        return None
    cast = _only_user(write)
    result = cast if cast is not None and cast.target is CAST else write
    total = _only_user(result)
    if total is not None and total.target is aten.add.Tensor and not total.kwargs:
        others: Any = [node for node in total.args if node is not result]
        if len(others) == 1 and _alike(others[0], result) and _alike(total, result):
            return TableGradient(write, others[0], total)
    return TableGradient(write, None, result) if result is not write else None


def _alike(node: Node, other: Node) -> bool:
    return shape_of(node) == shape_of(other) and fake_value(node).dtype == fake_value(other).dtype


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _replace(graph: Graph, gradient: TableGradient) -> None:
    arguments: Any = gradient.write.args
    _, mask, (index,), values = arguments
    wanted = fake_value(gradient.result)
    emit = Emitter(graph, wanted.fake_mode, key="val")
    with emit.before(gradient.result, AddTableRows.name):
        table = gradient.table
        if table is None:
            shape = list(wanted.shape)
            table = emit.call(aten.full.default, shape, 0, dtype=wanted.dtype, device=wanted.device)
        total = emit.trace(add_table_rows, table, mask, index, values)
    gradient.result.replace_all_uses_with(total)


def add_table_rows(table: Tensor, mask: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``table`` [V, H] with ``values`` [..., H] added to its rows ``index`` [...], where ``mask`` [..., 1] is True."""
    if table.dtype == values.dtype:
        return ADD_ROWS(table, mask, [index], values)  # type: ignore[no-any-return]
    ids = torch.where(mask[..., 0], index, 0).flatten()
    rows = torch.where(mask, values, 0.0).flatten(0, -2)
    places = torch.arange(ids.shape[0], device=ids.device)
    slots = aten.index_put(ids.new_zeros(table.shape[0]), [ids], places)[ids]
    once = aten.index_put(torch.zeros_like(rows), [slots], rows, True)
    total = (table[ids] + once[slots]).to(table.dtype)
    # rows are read before any is written, and those that stand for one token are equal
    written: Tensor = aten.index_put(table, [ids], torch.ops.cggr.fusion_barrier(total))
    return written
