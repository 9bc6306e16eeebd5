"""Sums, means and variances."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from cggr_compile.passes.joint.row_sparse.checkpoints import recomputed
from cggr_compile.passes.joint.row_sparse.layout import Layout, token_axes
from cggr_compile.passes.joint.row_sparse.plan import At, Call
from cggr_compile.passes.joint.row_sparse.rule import Rule, rule

if TYPE_CHECKING:
    from cggr_compile.passes.joint.row_sparse.annotations import Annotations

aten = torch.ops.aten


@rule(aten.sum.dim_IntList, aten.sum.default)
class Sum(Rule):
    """Sums over other axes keep the rows; sums over all tokens contract to a dense tensor."""

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
            return None
        keep = bool(node.args[2]) if len(node.args) > 2 else False
        return Call(args, tuple(tag for axis, tag in enumerate(layout) if keep or axis not in reduced))


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
