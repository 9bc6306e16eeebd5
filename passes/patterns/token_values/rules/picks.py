"""Entries of an axis of features that each position names by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cggr_compile.passes.nodes import argument, fake_value, op_name, shape_of
from cggr_compile.passes.patterns.token_values.layout import FEATURE
from cggr_compile.passes.patterns.token_values.planner import NotByPositionError, Planned, Planner, rule

if TYPE_CHECKING:
    from torch.fx import Node


@rule("gather", "take_along_dim")
def gather(planner: Planner, node: Node) -> Planned:
    """The entries of an axis of features that each position's indices name."""
    source, plan = planner.source(node)
    first, second = (1, 2) if op_name(node) == "gather" else (2, 1)
    dim, index = argument(node, first, "dim"), argument(node, second, "index", argument(node, second, "indices"))
    number = plan.layout.feature_of(dim) if isinstance(dim, int) else None
    if number is None or not hasattr(index, "meta") or len(shape_of(index)) != len(shape_of(source)):
        raise NotByPositionError(f"gathers along positions ({node})")
    return Planned(*_picked(planner, node, plan, number, index))


def _picked(planner: Planner, node: Node, plan: Planned, number: int, index: Node) -> tuple[Any, Any]:
    sizes = shape_of(index)
    kinds = plan.layout.axes
    whole = [size for kind, size in zip(kinds, shape_of(node), strict=True) if kind != FEATURE]
    if [size for kind, size in zip(kinds, sizes, strict=True) if kind != FEATURE] != whole:
        raise NotByPositionError(f"gathers at some of the positions ({node})")
    features = [size for kind, size in zip(kinds, shape_of(node), strict=True) if kind == FEATURE]
    marks = [mark and i != number for i, mark in enumerate(plan.layout.classes)]
    layout = plan.layout.with_features(features, marks)
    rows = clamped(planner, node, planner.aligned(node, index, layout, sizes), plan.layout.features[number])
    made = planner.other_call(node, "call_function", torch.gather, (plan.ref, 2 + number, rows))
    return layout, made


def clamped(planner: Planner, node: Node, index: Any, size: int) -> Any:
    """Indices in range: those of a row that has no value here may be anything."""
    return planner.other_call(node, "call_method", "clamp", (index, 0, size - 1))


def pick_by_position(planner: Planner, node: Node, source: Node, plan: Planned, items: Sequence[Any]) -> Planned:
    """``log_p[arange(N), labels]``: the class that each position names, of [N, V] or [B, S, V]."""
    layout, sizes = plan.layout, shape_of(source)
    leads = len(sizes) - 1
    if len(items) != len(sizes) or not layout.tokens_first or len(layout.features) != 1:
        raise NotByPositionError(f"picks entries in a way that is not understood ({node})")
    shape = tuple(sizes[:leads])
    whole = all(_counts(items[axis], axis, shape) for axis in range(leads))
    index = items[-1]
    if not whole or not hasattr(index, "meta") or shape_of(index) != shape or index in planner.behind:
        raise NotByPositionError(f"picks entries in a way that is not understood ({node})")
    if fake_value(index).dtype not in (torch.int64, torch.int32):
        raise NotByPositionError(f"picks entries by a mask ({node})")
    found = layout.without([leads])
    rows = clamped(planner, node, planner.taken(node, index, found), sizes[-1])
    rows = planner.reshape(node, rows, [1])
    made = planner.other_call(node, "call_function", torch.gather, (plan.ref, 2, rows))
    return Planned(found, planner.reshape(node, made, []))


def _counts(item: Any, axis: int, shape: tuple[int, ...]) -> bool:
    """Whether an index names every entry of its axis, in order: ``arange(n)``, perhaps with further axes of size 1."""
    if not hasattr(item, "meta"):
        return False
    expected = [1] * len(shape)
    expected[axis] = shape[axis]
    while expected and expected[0] == 1 and len(expected) > len(shape_of(item)):
        expected.pop(0)
    if list(shape_of(item)) != expected:
        return False
    while op_name(item) in ("getitem", "unsqueeze", "view", "reshape"):
        item = item.args[0]
    begins = (
        item.args[0] if len(item.args) == 1 else item.args[1] if len(item.args) == 2 and item.args[0] == 0 else None
    )
    return op_name(item) == "arange" and begins == shape[axis] and not item.kwargs.get("step")
