"""Sums, means and variances."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from cggr_compile.passes.joint.row_sparse.checkpoints import recomputed
from cggr_compile.passes.joint.row_sparse.division import SumOfEach
from cggr_compile.passes.joint.row_sparse.layout import Layout, token_axes
from cggr_compile.passes.joint.row_sparse.plan import At, Call
from cggr_compile.passes.joint.row_sparse.rule import Rule, rule
from cggr_compile.passes.nodes import fake_value, shape_of

if TYPE_CHECKING:
    from cggr_compile.passes.joint.row_sparse.annotations import Annotations
    from cggr_compile.passes.joint.row_sparse.values import RowValues

aten = torch.ops.aten


@rule(aten.sum.dim_IntList, aten.sum.default)
class Sum(Rule):
    """Sums over other axes keep the rows; sums over all tokens, or over the sequences, contract to a dense tensor."""

    contracts = True

    def carry(self, at: Annotations, node: Node) -> Call | None:
        source: Any = node.args[0]
        layout = at.layouts[source]
        args = (At(source, layout), *node.args[1:])
        axes: Any = node.args[1] if len(node.args) > 1 else None
        rank, tokens = len(layout), set(token_axes(layout))
        reduced = {axis % rank for axis in axes} if axes else set(range(rank))
        if tokens <= reduced:
            return Call(args, None) if self.contracts else None
        if tokens & reduced:
            return _over_sequences(node, layout) if self.contracts and reduced == {0} else None
        keep = bool(node.args[2]) if len(node.args) > 2 else False
        return Call(args, tuple(tag for axis, tag in enumerate(layout) if keep or axis not in reduced))

    def divided(self, at: Annotations, node: Node) -> SumOfEach | None:
        source: Any = node.args[0]
        division = at.divisions[source]
        axes: Any = node.args[1] if len(node.args) > 1 else None
        rank = len(division.layout)
        reduced = {axis % rank for axis in axes} if axes else set(range(rank))
        if not self.contracts or division.axis in reduced or not set(token_axes(division.layout)) <= reduced:
            return None
        keep = bool(node.args[2]) if len(node.args) > 2 else False
        axis = division.axis if keep else division.axis - sum(a < division.axis for a in reduced)
        rest = node.args[1:]
        return SumOfEach(source, axis, lambda rv, columns, _: rv.emit.call(node.target, columns, *rest, **node.kwargs))


@rule(aten.mean.dim)
class Mean(Sum):
    """A mean over tokens would divide by the number of rows; in the forward pass it is there already."""

    mixes = "features"
    contracts = False

    def recompute(self, at: Annotations, node: Node, layout: Layout) -> Call | None:
        return of_features(node, layout) if recomputed(node) else None


@rule(aten.var_mean.correction)
class VarMean(Rule):
    mixes = "features"


@rule(operator.getitem)
class Item(Rule):
    """Of a variance and mean that a checkpoint computes again."""

    mixes = "features"

    def recompute(self, at: Annotations, node: Node, layout: Layout) -> Call | None:
        arguments: Any = node.args
        source, index = arguments
        both = of_features(source, layout) if source.target is aten.var_mean.correction and recomputed(node) else None
        if both is None:
            return None
        call = both
        return Call((), layout, make=lambda rv: rv.emit.item(call.made(rv, source), index))


def of_features(node: Node, layout: Layout) -> Call | None:
    """A mean, or variance and mean, along other axes than the positions; None along those."""
    source: Any = node.args[0]
    axes: Any = node.args[1]
    keeps = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    if not keeps or not axes or any(layout[axis % len(layout)] for axis in axes):
        return None
    return Call((At(source, layout), *node.args[1:]), layout)


def _over_sequences(node: Node, layout: Layout) -> Call | None:
    """The sum over sequences, [S, ...], of [B, S, ...]: a learned position's gradient. Rows of one position are added.

    In float32 at least, as a sum is; and one tensor of all positions, where there was one for every sequence.
    """
    if layout[:2] != ("B", "S") or any(layout[2:]):
        return None
    shape, value = shape_of(node), fake_value(node)
    wide = torch.promote_types(value.dtype, torch.float32)

    def make(rv: RowValues, rows: Node) -> Node:
        call, width = rv.emit.call, shape_of(rows)[2:]
        slots = [rv.batch * rv.slots]
        zeros = call(aten.full.default, [rv.length, *width], 0, dtype=wide, device=value.device, pin_memory=False)
        flat = rv.view(_cast(rv, rows, wide), [*slots, *width])
        total = call(aten.index_put.default, zeros, [rv.view(rv.rows, slots)], flat, True)
        return rv.view(_cast(rv, total, value.dtype), list(shape))

    return Call((At(node.args[0], layout),), None, make=make)  # type: ignore[arg-type]


def _cast(rv: RowValues, node: Node, dtype: torch.dtype) -> Node:
    if fake_value(node).dtype == dtype:
        return node
    return rv.emit.call(torch.ops.prims.convert_element_type.default, node, dtype)
