"""Rows of tensors: gathering them, spreading them out again, and the memory of both.

What is emitted here is emitted in every layer, and shared between its readers piece by piece; so the calls are put
together one by one, and not traced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.joint.row_sparse.checkpoints import RECOMPUTE, kept_by_checkpoint, recomputed
from cggr_compile.passes.joint.row_sparse.layout import SEQUENCES, Layout, has_rows, resize
from cggr_compile.passes.joint.row_sparse.rule import rule_of
from cggr_compile.passes.nodes import fake_value, shape_of

if TYPE_CHECKING:
    from torch.fx import Graph, Node

    from cggr_compile.passes.joint.row_sparse.annotations import Annotations
    from cggr_compile.passes.joint.row_sparse.division import Divided

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """A tensor that is zero outside the selected positions: ``values`` holds the rest, laid out as ``layout``."""

    values: Node
    layout: Layout


class RowValues:
    """The second half of the pass: the selected rows, the values on rows so far, and how to make rows of others."""

    def __init__(self, graph: Graph, rows: Node, keep: Node, at: Annotations) -> None:
        self.graph, self.rows, self.keep, self.at = graph, rows, keep, at
        self.factors: Node | None = None  # what markers multiply the gradient of the rows with
        self.batch, self.length, self.slots = at.batch, at.length, at.slots
        self.emit = Emitter(graph, fake_value(rows).fake_mode, key="val")
        self.sparse: dict[Node, Rows] = {}
        self.divided: dict[Node, Divided] = {}
        self.stage: dict[Node, int] = {}  # of the forward pass: see stages.py
        self._replaced: dict[Node, Node] = {}
        self._rows_of: dict[tuple[Node, Layout], Node] = {}
        self._dense: dict[Node, Node] = {}
        self._fenced: dict[int, Node] = {}
        self._flat: dict[Node, Node] = {}
        self._folded: dict[tuple[Node, int], Node] = {}

    def rows_for(self, node: Node) -> Node:
        """The selected rows, to gather ``node`` with: each stage of the forward pass has its own."""
        stage = self.stage.get(node, 0)
        if not stage:
            return self.rows
        if stage not in self._fenced:
            self._fenced[stage] = self.emit.call(torch.ops.cggr.fusion_barrier.default, self.rows, stage)
        return self._fenced[stage]

    def flat_rows(self, node: Node) -> Node:
        """int64 [B * K]: positions in a flattened [B * S], to gather ``node`` with."""
        rows = self.rows_for(node)
        if rows not in self._flat:
            call = self.emit.call
            flat = rows
            if self.batch > 1:
                device = fake_value(self.rows).device
                start = call(aten.mul.Tensor, call(torch.ops.prims.iota.default, self.batch, start=0, step=1,
                             dtype=torch.int64, device=device, requires_grad=False), self.length)  # fmt: skip
                flat = call(aten.add.Tensor, rows, call(aten.unsqueeze.default, start, 1))
            self._flat[rows] = call(aten.view.default, flat, [self.batch * self.slots])
        return self._flat[rows]

    def folded(self, selected: Node, size: int) -> Node:
        """``rows`` or ``keep`` [B, K] for a batch axis of ``size`` that has others folded into it: [size, K]."""
        if size == self.batch:
            return selected
        key = (selected, size)
        if key not in self._folded:
            shape = [self.batch, size // self.batch, self.slots]
            wide = self.emit.call(aten.expand.default, self.emit.call(aten.unsqueeze.default, selected, 1), shape)
            self._folded[key] = self.view(wide, [size, self.slots])
        return self._folded[key]

    def index(self, node: Node, shape: list[int], layout: Layout) -> tuple[int, Node]:
        """Axis of the positions and the slots' positions expanded to the ``shape`` of the rows of ``node``."""
        first, axis = (i for i, tag in enumerate(layout) if tag in (*SEQUENCES, "S"))
        assert layout[axis] == "S"
        view = [1] * len(shape)
        view[first], view[axis] = shape[first], self.slots
        rows = self.emit.call(aten.view.default, self.folded(self.rows_for(node), shape[first]), view)
        return axis, self.emit.call(aten.expand.default, rows, shape)

    def gather(self, node: Node, layout: Layout) -> Node:
        if "BS" in layout:
            indices = [None] * layout.index("BS")
            return self.emit.call(aten.index.Tensor, node, [*indices, self.flat_rows(node)])
        shape, source = resize(shape_of(node), layout, self.batch, self.slots), node
        if "b" in layout:
            full = list(shape_of(node))
            full[layout.index("b")] = self.batch
            node = self.emit.call(aten.expand.default, node, full)
        elif order := _memory_order(node, layout):
            permuted = self.emit.call(aten.permute.default, node, order)
            self.stage[permuted] = self.stage.get(node, 0)
            packed = self.gather(permuted, tuple(layout[i] for i in order))
            return self.emit.call(aten.permute.default, packed, [order.index(i) for i in range(len(order))])
        axis, index = self.index(source, shape, layout)
        return self.emit.call(aten.gather.default, node, axis, index)

    def zero_unused_slots(self, values: Node, layout: Layout) -> Node:
        """``values`` with unused slots set to zero."""
        return self.emit.masked(self.on_slots(self.keep, layout, values), values)

    def on_slots(self, each: Node, layout: Layout, values: Node) -> Node:
        """``each`` [B, K], one number per slot, in a shape that broadcasts to ``values``."""
        shape = [1] * len(layout)
        if "BS" in layout:
            shape[layout.index("BS")] = self.batch * self.slots
        else:
            first, axis = (i for i, tag in enumerate(layout) if tag)
            shape[first], shape[axis] = shape_of(values)[first], self.slots
            each = self.folded(each, shape[first])
        return self.emit.call(aten.view.default, each, shape)

    def dense(self, node: Node) -> Node:
        """The full tensor of a sparse value; a divided one is there already."""
        if node in self.divided:
            return node
        if node not in self._dense:
            rows = self.sparse[node]
            value = fake_value(node)
            zeros = self.emit.call(
                aten.full.default, list(value.shape), 0, dtype=value.dtype, device=value.device, pin_memory=False
            )
            if "BS" in rows.layout:
                indices = [None] * rows.layout.index("BS")
                full = self.emit.call(aten.index_put.default, zeros, [*indices, self.flat_rows(node)], rows.values)
            else:
                axis, index = self.index(node, list(shape_of(rows.values)), rows.layout)
                full = self.emit.call(aten.scatter.src, zeros, axis, index, rows.values)
            self._dense[node] = self.strided_like(full, node)
        return self._dense[node]

    def strided_like(self, made: Node, original: Node) -> Node:
        """``made`` with the strides of the value it replaces: views downstream rely on them."""
        wanted = fake_value(original).stride()
        if fake_value(made).stride() == wanted:
            return made
        order = sorted(range(len(wanted)), key=lambda axis: -wanted[axis])
        inverse = [order.index(axis) for axis in range(len(order))]
        packed = self.emit.call(aten.permute.default, made, order)
        packed = self.emit.call(aten.clone.default, packed, memory_format=torch.contiguous_format)
        return self.emit.call(aten.permute.default, packed, inverse)

    def view(self, node: Node, shape: list[int]) -> Node:
        if list(shape_of(node)) == shape:
            return node  # as it is in memory: a copy would be a kernel of its own in front of the row attention
        if not fake_value(node).is_contiguous():
            node = self.emit.call(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self.emit.call(aten.view.default, node, shape)

    def rows_of(self, node: Node, layout: Layout) -> Node:
        """The rows of ``node``: through views and cheap arithmetic, gathered where something is stored."""
        if not has_rows(layout):
            return self.dense(node) if node in self.sparse else node
        if node in self.sparse and self.sparse[node].layout == layout:
            return self.sparse[node].values
        if node in self.divided and self.divided[node].division.layout == layout:
            return self._divided_rows(self.divided[node])
        key = (node, layout)
        if key not in self._rows_of:
            again = node.op == "call_function" and node not in self.sparse and not kept_by_checkpoint(node)
            call = rule_of(node.target).recompute(self.at, node, layout) if again else None
            source = self.dense(node) if node in self.sparse else node
            self._rows_of[key] = rows = call.made(self, node) if call is not None else self.gather(source, layout)
            self.stage[rows] = self.stage.get(node, 0)
            if recomputed(node):  # in the backward pass, as the checkpoint wants it, and not kept either
                rows.meta.update({name: node.meta[name] for name in RECOMPUTE})
        return self._rows_of[key]

    def _divided_rows(self, divided: Divided) -> Node:
        layout, axis = divided.division.layout, divided.division.axis
        return divided.division.joined(self, axis, divided.rows, self.rows_of(divided.dense, layout))

    def with_rank(self, node: Node, rank: int) -> Node:
        """``node`` with axes of size 1 in front, if it has fewer than ``rank``."""
        missing = rank - len(shape_of(node))
        return self.emit.call(aten.view.default, node, [*[1] * missing, *shape_of(node)]) if missing > 0 else node

    def zeros(self, node: Node, layout: Layout) -> Node:
        """Zeros instead of the rows of ``node``."""
        value = fake_value(node)
        return self.emit.call(
            aten.full.default, self.at.sizes(node, layout), 0, dtype=value.dtype, device=value.device, pin_memory=False
        )

    def put(self, node: Node, values: Node, layout: Layout) -> None:
        """``node`` is ``values`` on rows."""
        self.sparse[node] = Rows(values, layout)

    def replace(self, node: Node, made: Node) -> None:
        """``made``, with the strides of the dense ``node``, stands for it from here on."""
        self.at.backward.add(made)
        self.stand_for(node, self.strided_like(made, node))

    def stand_for(self, node: Node, made: Node) -> None:
        """``made`` stands for the dense ``node`` from here on."""
        self._replaced[node] = made
        node.replace_all_uses_with(made)

    def current(self, node: Node) -> Node:
        """What stands for a dense ``node`` of the graph that was annotated."""
        return self._replaced.get(node, node)


def _memory_order(node: Node, layout: Layout) -> list[int] | None:
    """The order of a value's axes in memory if that is another one, with the sequences still before their positions.

    Rows gathered in that order are read in one piece, and are stored like the value, so that views of it stay views.
    """
    strides = fake_value(node).stride()
    order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    tagged = [layout[axis] for axis in order if layout[axis]]
    return order if 0 not in strides and order != sorted(order) and tagged[-1] == "S" else None
