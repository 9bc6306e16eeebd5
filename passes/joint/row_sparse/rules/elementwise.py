"""Elementwise operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from cggr_compile import compat
from cggr_compile.passes.fx import is_zeros
from cggr_compile.passes.joint.row_sparse.division import Both, divide
from cggr_compile.passes.joint.row_sparse.layout import Layout, token_axes
from cggr_compile.passes.joint.row_sparse.plan import At, Call
from cggr_compile.passes.joint.row_sparse.rule import Rule, rule, rule_for_class
from cggr_compile.passes.nodes import shape_of

if TYPE_CHECKING:
    from cggr_compile.passes.joint.row_sparse.annotations import Annotations
    from cggr_compile.passes.joint.row_sparse.plan import Plan

aten = torch.ops.aten
prims = torch.ops.prims


def _pointwise(target: compat.OpOverload) -> bool:
    drawn = torch.Tag.nondeterministic_seeded in target.tags
    return torch.Tag.pointwise in target.tags and not drawn and not compat.schema(target).is_mutable


@rule_for_class(_pointwise)
class Elementwise(Rule):
    """f(x, ...): of a zero it may make anything, so that a sparse value does not go through."""

    mixes = "nothing"

    def recompute(self, at: Annotations, node: Node, layout: Layout) -> Call | None:
        args = at.aligned(node, layout)
        return None if args is None else Call(args, layout)

    def _carried(self, at: Annotations, node: Node, source: Any) -> Call | None:
        """The call on the rows of ``source``, which has the result's token axes in full; f(0) is zero."""
        layout = at.layout_of(source)
        if layout is None or not spans(source, layout, node):
            return None
        return self.recompute(at, node, layout)


def spans(value: Any, layout: Layout, node: Node) -> bool:
    """Whether an operand has the result's token axes in full (it may broadcast along the others)."""
    mine, result = shape_of(value), shape_of(node)
    return len(mine) == len(result) and all(mine[a] == result[a] for a in token_axes(layout))


@rule(
    *(aten.neg.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.mul.Scalar),
    *(aten.div.Scalar, aten.div.Tensor, prims.convert_element_type.default, aten._to_copy.default),
    *(aten.threshold_backward.default, aten.gelu_backward.default, aten.silu_backward.default),
    *(aten.tanh_backward.default, aten.sigmoid_backward.default),
)
class LinearInFirst(Elementwise):
    """f(g, ...) with f(0, ...) = 0: negation, casts, quotients, gradients of activations."""

    def carry(self, at: Annotations, node: Node) -> Call | None:
        return self._carried(at, node, node.args[0])

    def divided(self, at: Annotations, node: Node) -> Both | None:
        return of_each(at, node)


@rule(aten.mul.Tensor)
class Mul(Elementwise):
    """g * x with either factor sparse."""

    def carry(self, at: Annotations, node: Node) -> Call | None:
        left, right = node.args
        return self._carried(at, node, left) or self._carried(at, node, right)

    def divided(self, at: Annotations, node: Node) -> Both | None:
        return of_each(at, node)


def of_each(at: Annotations, node: Node) -> Both | None:
    """The call on the columns of each kind, if they are its one tensor."""
    arguments: Any = node.args
    source, *others = arguments
    if source not in at.divisions or any(isinstance(n, Node) for n in (*others, *node.kwargs.values())):
        return None
    division = at.divisions[source]
    return Both(source, division, lambda rv, part, _: rv.emit.call(node.target, part, *others, **node.kwargs))


@rule(aten.add.Tensor, aten.sub.Tensor)
class Add(Elementwise):
    """g + h, both sparse on the same axes, or one of them zeros; or both the gradient of reading a part."""

    def carry(self, at: Annotations, node: Node) -> Plan | None:
        return self._sparse(at, node) or divide(at, node)

    def _sparse(self, at: Annotations, node: Node) -> Call | None:
        left, right = node.args
        if at.layout_of(left) and at.layout_of(left) == at.layout_of(right):
            return self._carried(at, node, left)
        if is_zeros(right):
            return self._unchanged(at, node, left)
        if is_zeros(left) and node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
            return self._unchanged(at, node, right)
        return None

    def _unchanged(self, at: Annotations, node: Node, value: Any) -> Call | None:
        layout = at.layout_of(value)
        if layout is None or shape_of(value) != shape_of(node):
            return None
        return Call((At(value, layout),), layout, make=lambda rv, rows: rows)


@rule(aten.where.self)
class Where(Elementwise):
    """where(c, g, 0), where(c, 0, g) and where(c, g, h)."""

    def carry(self, at: Annotations, node: Node) -> Call | None:
        _, yes, no = node.args
        value, other = (yes, no) if at.layout_of(yes) else (no, yes)
        layout = at.layout_of(value)
        if layout is None or shape_of(value) != shape_of(node):
            return None
        if not at.layout_of(other) and not is_zeros(other) and not _is_zero_scalar(other):
            return None
        return self.recompute(at, node, layout)


def _is_zero_scalar(value: Any) -> bool:
    return bool(isinstance(value, Node) and value.target is aten.scalar_tensor.default and value.args[0] == 0)


@rule("prims.fma.default")  # torch._inductor registers it, which is not imported with this module
class FusedMultiplyAdd(Rule):
    """x * g + h, which ends the backward of softmax.

    Its rows of columns, for the keys, are gathered: it is stored whole for the queries.
    """

    def carry(self, at: Annotations, node: Node) -> Call | None:
        _, factor, term = node.args
        layout = at.layout_of(factor)
        if layout is None or layout != at.layout_of(term) or not spans(factor, layout, node):
            return None
        args = at.aligned(node, layout)
        return None if args is None else Call(args, layout)


@rule(aten.cos.default, aten.sin.default)
class Angles(Rule):
    """Tables that all layers read: rows are gathered from them, and not computed again in every stage."""
