"""Row versions of tensors: gathering them, spreading them out again, and the memory of both."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cggr_compile.passes.base import fake_value, shape_of
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.row_sparse.layout import (
    SEQUENCES,
    Layout,
    Tag,
    align,
    canonical,
    has_rows,
    positions_first,
    regroup,
    resize,
)

if TYPE_CHECKING:
    from torch.fx import Graph, Node

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """A tensor that is zero outside the selected positions: ``values`` holds the rest, laid out as ``layout``."""

    values: Node
    layout: Layout


class RowValues:
    """Everything the rules need: the selected rows, the sparse values so far, and how to make row versions."""

    def __init__(self, graph: Graph, rows: Node, keep: Node, batch: int, length: int) -> None:
        self.graph, self.rows, self.keep = graph, rows, keep
        self.batch, self.length, self.slots = batch, length, shape_of(rows)[1]
        self.emit = Emitter(graph, fake_value(rows).fake_mode, key="val")
        self.sparse: dict[Node, Rows] = {}
        self.stage: dict[Node, int] = {}  # of the forward pass: see stages.py
        self.backward: set[Node] = set()  # nodes that depend on a gradient: their dense value may never be needed
        self.densified: Counter[str] = Counter()  # by operator
        self.dense_attention: Counter[str] = Counter()  # by reason
        self._versions: dict[tuple[Node, Layout], Node] = {}
        self._dense: dict[Node, Node] = {}
        self._fenced: dict[int, Node] = {}
        self._flat: dict[Node, Node] = {}
        self._folded: dict[tuple[Node, int], Node] = {}

    def layout(self, *tags: Tag) -> Layout:
        return canonical(tags, self.batch)

    def rows_for(self, node: Node) -> Node:
        """The selected rows, to gather ``node`` with: each stage of the forward pass has its own."""
        stage = self.stage.get(node, 0)
        if not stage:
            return self.rows
        if stage not in self._fenced:
            self._fenced[stage] = self.emit.call(torch.ops.cggr.fence.default, self.rows, stage)
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

    def kept(self, values: Node, layout: Layout) -> Node:
        """``values`` with unused slots set to zero."""
        return self.emit.kept(self.on_slots(self.keep, layout, values), values)

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
        """The full tensor of a sparse value."""
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

    def version(self, node: Node, layout: Layout) -> Node:
        """The row version of ``node``: through views and cheap arithmetic, gathered where something is stored."""
        if not has_rows(layout):
            return self.dense(node) if node in self.sparse else node
        if node in self.sparse and self.sparse[node].layout == layout:
            return self.sparse[node].values
        key = (node, layout)
        if key not in self._versions:
            again = node not in self.sparse and not kept_by_checkpoint(node)
            made = self._recompute(node, layout) if again else None
            source = self.dense(node) if node in self.sparse else node
            self._versions[key] = rows = made if made is not None else self.gather(source, layout)
            self.stage[rows] = self.stage.get(node, 0)
            if recomputed(node):  # in the backward pass, as the checkpoint wants it, and not kept either
                rows.meta.update({name: node.meta[name] for name in RECOMPUTE})
        return self._versions[key]

    def _recompute(self, node: Node, layout: Layout) -> Node | None:
        target: Any = node.target
        if node.op != "call_function":
            return None
        if target in POINTWISE:
            operands = self.aligned(node, layout)
            return self.emit.call(target, *operands, **node.kwargs) if operands is not None else None
        source: Any = node.args[0] if node.args else None
        if target in (aten.view.default, aten._unsafe_view.default):
            before = regroup(shape_of(node), layout, shape_of(source), self.batch)
            if before is None or "b" in layout:
                return None
            return self.view(self.version(source, before), resize(shape_of(node), layout, self.batch, self.slots))
        if target is aten.permute.default:
            order: Any = node.args[1]
            before = tuple(layout[list(order).index(i)] for i in range(len(layout)))
            if positions_first(before):
                return None
            return self.emit.call(target, self.version(source, before), order)
        if target is aten.expand.default:
            rows = self.operand(source, layout, shape_of(node)) if "b" not in layout else None
            shape = resize(shape_of(node), layout, self.batch, self.slots)
            return None if rows is None else self.emit.call(target, rows, shape)
        if target is aten.full.default and "b" not in layout:
            shape = resize(shape_of(node), layout, self.batch, self.slots)
            return self.emit.call(target, shape, *node.args[1:], **node.kwargs)
        if target is aten.unsqueeze.default:
            position: Any = node.args[1]
            axis = position % len(layout)
            before = layout[:axis] + layout[axis + 1 :]
            return self.emit.call(target, self.version(source, before), axis) if layout[axis] is None else None
        if target is operator.getitem and source.target is aten.var_mean.correction and recomputed(node):
            both = self._reduced(source, layout)
            return None if both is None else self.emit.item(both, int(node.args[1]))  # type: ignore[arg-type]
        if target is aten.mean.dim and recomputed(node):
            return self._reduced(node, layout)
        # in the forward pass the product is there already; where it is not, only its rows may be needed
        product = target in (aten.mm.default, aten.bmm.default) and "b" not in layout
        if product and self._only_rows(node):
            other: Any = node.args[1]
            *_, left, right = layout
            if left in ("S", "BS"):
                return self.emit.call(target, self.version(source, layout), other)
            if right in ("S", "BS"):
                return self.emit.call(target, source, self.version(other, layout))
        if target is aten.addmm.default and layout == ("BS", None) and len(shape_of(source)) == 1:
            _, factor, other = node.args
            if self._only_rows(node):
                return self.emit.call(target, source, self.version(factor, layout), other, **node.kwargs)  # type: ignore[arg-type]
        return None

    def _reduced(self, node: Node, layout: Layout) -> Node | None:
        """A mean, or variance and mean, along other axes than the positions; None along those."""
        source: Any = node.args[0]
        axes: Any = node.args[1]
        keeps = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
        if not keeps or not axes or any(layout[axis % len(layout)] for axis in axes):
            return None
        return self.emit.call(node.target, self.version(source, layout), *node.args[1:], **node.kwargs)

    def _only_rows(self, node: Node) -> bool:
        """Whether the whole product is wanted for nothing else."""
        if node in self.backward:
            return ends_at_markers(node, ROW_WISE)
        return recomputed(node) and not _mixes_positions(node)

    def aligned(self, node: Node, layout: Layout) -> list[Any] | None:
        """Arguments of an elementwise call on rows, or None if an operand does not line up."""
        operands: list[Any] = []
        for argument in node.args:
            if not isinstance(argument, torch.fx.Node) or not shape_of(argument):
                operands.append(argument)
                continue
            rows = self.operand(argument, layout, shape_of(node))
            if rows is None:
                return None
            operands.append(rows)
        return operands

    def operand(self, node: Node, layout: Layout, shape: Sequence[int]) -> Node | None:
        """The row version of what broadcasts to ``shape`` with ``layout``; None if it does not line up."""
        mine = align(layout, shape, shape_of(node))
        if mine is None:  # no batch axis of its own: give it one
            lead = [1] * (len(shape) - len(shape_of(node)))
            node = self.emit.call(aten.view.default, node, [*lead, *shape_of(node)])
            mine = align(layout, shape, shape_of(node))
        return None if mine is None else self.version(node, mine)


def _memory_order(node: Node, layout: Layout) -> list[int] | None:
    """The order of a value's axes in memory if that is another one, with the sequences still before their positions.

    Rows gathered in that order are read in one piece, and are stored like the value, so that views of it stay views.
    """
    strides = fake_value(node).stride()
    order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    tagged = [layout[axis] for axis in order if layout[axis]]
    return order if 0 not in strides and order != sorted(order) and tagged[-1] == "S" else None


def ends_at_markers(node: Node, through: Collection[Any]) -> bool:
    """Whether selected rows are all that is wanted of a gradient: it goes to markers only, ``through`` calls."""
    return all(
        user.target is torch.ops.cggr.stop_rows_backward.default
        or (user.target in through and ends_at_markers(user, through))
        for user in node.users
    )


def recomputed(node: Node) -> bool:
    """Whether an activation checkpoint computes this again in the backward pass."""
    return "recompute" in node.meta and not kept_by_checkpoint(node)


def kept_by_checkpoint(node: Node) -> bool:
    """Whether this is computed inside a checkpoint and kept for the next one: it is the result of the first."""
    region = node.meta.get("ac_graph_id")
    return region is not None and any(user.meta.get("ac_graph_id", region) != region for user in node.users)


def _mixes_positions(node: Node) -> bool:
    """Whether its checkpoint makes something else of ``node`` than a function of each position: attention, mostly."""
    region, seen, waiting = node.meta["ac_graph_id"], {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            if user in seen or user.meta.get("ac_graph_id") != region:
                continue
            if user.target not in ROW_WISE and user.target not in FEATURES:
                return True
            seen.add(user)
            waiting.append(user)
    return False


RECOMPUTE = ("recompute", "ac_graph_id")
POINTWISE = {
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar),
    *(aten.add.Scalar, aten.sub.Scalar, aten.neg.default, aten.rsqrt.default, aten.sqrt.default, aten.exp.default),
    *(aten.pow.Tensor_Scalar, aten.sigmoid.default, aten.tanh.default, aten.erf.default, aten.relu.default),
    *(aten.reciprocal.default, aten.square.default, aten.where.self, aten.alias.default, aten.clone.default),
    *(aten.eq.Scalar, aten.ne.Scalar, aten.gt.Scalar, aten.lt.Scalar, aten.ge.Scalar, aten.le.Scalar),
    *(aten.eq.Tensor, aten.bitwise_and.Tensor, aten.bitwise_not.default, aten.logical_not.default, aten.abs.default),
    *(torch.ops.prims.convert_element_type.default, aten.detach.default, aten.log.default, aten.gelu.default),
}
ROW_WISE = {
    *POINTWISE,
    *(aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.unsqueeze.default, aten.expand.default),
}
# each position's features together
FEATURES = {
    *(aten.mm.default, aten.addmm.default, aten.mean.dim, aten.var_mean.correction, operator.getitem),
}
