"""Reductions and other operations along axes of features."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from cggr_compile.passes.nodes import argument, fake_value, op_name, shape_of
from cggr_compile.passes.patterns.token_values.layout import FEATURE
from cggr_compile.passes.patterns.token_values.planner import NotByPositionError, Planned, Planner, rule
from cggr_compile.passes.patterns.token_values.rules.pointwise import pointwise

if TYPE_CHECKING:
    from torch.fx import Node

# Where the axis is among the arguments, and what it is where it is not given; ALL: every axis.
ALL = object()
_ALONG: dict[str, tuple[int, Any]] = {
    **dict.fromkeys(("sum", "mean", "prod", "amax", "amin", "logsumexp", "argmax", "argmin", "any", "all"), (1, ALL)),
    **dict.fromkeys(
        ("softmax", "log_softmax", "softmin", "cumsum", "logcumsumexp", "var", "std", "max", "min"), (1, ALL)
    ),
    **dict.fromkeys(("sort", "argsort"), (1, -1)),
    "topk": (2, -1),
    "norm": (2, ALL),
    "vector_norm": (2, ALL),
    "normalize": (2, 1),
    "nansum": (1, ALL),
}
# that leave the axis as it is; the others leave one entry, or some that are no classes
_KEEPING = {"softmax", "log_softmax", "softmin", "cumsum", "logcumsumexp", "sort", "argsort", "normalize"}
SPLIT = {"sum", "mean"}  # over positions and features: over features first


@rule(*_ALONG)
def along(planner: Planner, node: Node) -> Planned:
    """A reduction, or another operation along an axis of features."""
    name = op_name(node)
    source, plan = planner.source(node)
    if name in ("max", "min") and isinstance(argument(node, 1, "other"), type(source)):
        return pointwise(planner, node)
    axes = axes_of(node, len(shape_of(source)))
    numbers = [plan.layout.feature_of(axis) for axis in axes]
    if any(number is None for number in numbers):
        raise NotByPositionError(f"takes {name!r} ({node}) over positions and logits at once")
    args, kwargs = _with_axes(node, [2 + number for number in numbers if number is not None], plan.ref)
    made = planner.call(node, args, kwargs)
    value = fake_value(node)
    parts = list(value) if isinstance(value, (tuple, list)) else [value]
    found = []
    for number, part in enumerate(parts):
        layout = plan.layout
        if part.dim() < len(layout.axes):
            layout = layout.without(axes)
        else:
            sizes = [size for kind, size in zip(layout.axes, part.shape, strict=True) if kind == FEATURE]
            keeps = name in _KEEPING
            layout = layout.with_features(
                sizes, [m and (keeps or i not in numbers) for i, m in enumerate(layout.classes)]
            )
        ref = made
        if isinstance(value, (tuple, list)):
            ref = planner.other_call(node, "call_function", operator.getitem, (made, number))
        found.append(Planned(layout, ref))
    return found[0] if not isinstance(value, (tuple, list)) else Planned(plan.layout, made, tuple(found))


def axes_of(node: Node, rank: int) -> list[int]:
    """The axes that a call along axes works on."""
    place, default = _ALONG[op_name(node)]
    given = argument(node, place, "dim", argument(node, place, "axis", default))
    if given is ALL or given is None or given == () or given == []:
        return list(range(rank))
    listed = given if isinstance(given, (list, tuple)) else [given]
    if not all(isinstance(axis, int) for axis in listed):
        raise NotByPositionError(f"takes {op_name(node)!r} ({node}) over an axis that is no number")
    return [axis % rank for axis in listed]


def _with_axes(node: Node, axes: list[int], source: Any) -> tuple[list[Any], dict[str, Any]]:
    """The arguments, with other axes."""
    place, _ = _ALONG[op_name(node)]
    given = argument(node, place, "dim", argument(node, place, "axis"))
    new: Any = tuple(axes) if isinstance(given, (list, tuple)) or len(axes) != 1 else axes[0]
    args, kwargs = list(node.args), {name: value for name, value in node.kwargs.items() if name not in ("dim", "axis")}
    if args:
        args[0] = source
    else:
        kwargs["input"] = source
    if len(args) > place:
        args[place] = new
    else:
        kwargs["dim"] = new
    others = [n for n in (*args, *kwargs.values()) if hasattr(n, "meta")]
    if others:
        raise NotByPositionError(f"has an operator {op_name(node)!r} ({node}) whose arguments are tensors")
    return args, kwargs
