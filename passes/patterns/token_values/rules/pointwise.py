"""Operators that compute every entry from the entries of the same place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.node import map_arg

from cggr_compile import compat
from cggr_compile.passes.nodes import differentiable, fake_value, op_name, shape_of
from cggr_compile.passes.patterns.head import CASTS
from cggr_compile.passes.patterns.token_values.layout import FEATURE
from cggr_compile.passes.patterns.token_values.planner import NotByPositionError, Planned, Planner, rule_where

if TYPE_CHECKING:
    from torch.fx import Node

_POINTWISE = {
    *CASTS,
    "logsigmoid",
    "softplus",
    "gelu",
    "silu",
    "mish",
    "hardtanh",
    "relu6",
    "square",
    "identity",
    "neg",
}
_NOT_POINTWISE = {"dropout", "copy", "index_put", "masked_scatter"}


def is_pointwise(node: Node) -> bool:
    """Whether an operator computes every entry from the entries of the same place."""
    name = op_name(node).partition(".")[0]
    if name in _NOT_POINTWISE:
        return False
    packet = getattr(torch.ops.aten, name, None)
    ours = not isinstance(node.target, (compat.OpOverload, compat.HigherOrderOperator))
    ours = ours or getattr(node.target, "namespace", "") == "aten"
    tagged = isinstance(packet, compat.OpOverloadPacket) and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )
    return ours and (name in _POINTWISE or tagged)


@rule_where(is_pointwise)
def pointwise(planner: Planner, node: Node) -> Planned:
    """A call whose operands are broadcast to the shape of its value."""
    value = fake_value(node)
    operands = [n for n in node.all_input_nodes if n in planner.behind and differentiable(n)]
    if not operands or not isinstance(value, torch.Tensor):
        raise NotByPositionError(f"has an operator {op_name(node)!r} ({node}) that makes no tensor of tensors")
    plans = [planner.plan(n) for n in operands]
    shape = shape_of(node)
    layout = plans[0].layout
    if any(len(shape_of(n)) != len(shape) for n in operands) or any(plan.layout.axes != layout.axes for plan in plans):
        raise NotByPositionError(f"combines values of different axes ({node})")
    features = [size for kind, size in zip(layout.axes, shape, strict=True) if kind == FEATURE]
    classes = [any(marks) for marks in zip(*(plan.layout.classes for plan in plans), strict=True)]
    layout = layout.with_features(features, classes)
    if op_name(node) in CASTS:  # other operands say the dtype
        given = node.args[0]
        args, kwargs = _with_nodes(node, lambda n: plans[0].ref if n is given else n)
    else:
        args, kwargs = _with_nodes(node, lambda n: planner.aligned(node, n, layout, shape))
    return Planned(layout, planner.call(node, args, kwargs))


def _with_nodes(node: Node, function: Callable[[Node], Any]) -> Any:
    """The arguments, with something in place of their nodes."""
    return map_arg((node.args, node.kwargs), function)
