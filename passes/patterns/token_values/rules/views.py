"""The rules of views, pieces and joins."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cggr_compile.passes.nodes import argument, differentiable, fake_value, op_name, shape_of
from cggr_compile.passes.patterns.token_values.layout import (
    FEATURE,
    Layout,
    cut,
    joined,
    permuted,
    picked,
    reshaped,
    stacked,
)
from cggr_compile.passes.patterns.token_values.planner import NotByPositionError, Planned, Planner, rule
from cggr_compile.passes.patterns.token_values.rules.picks import pick_by_position

if TYPE_CHECKING:
    from torch.fx import Node


@rule("view", "reshape", "unsqueeze", "squeeze", "contiguous", "clone")
def shape(planner: Planner, node: Node) -> Planned:
    """The same entries in another shape."""
    source, plan = planner.source(node)
    if fake_value(node).dtype != fake_value(source).dtype:
        raise NotByPositionError(f"looks at logits as another dtype ({node})")
    return _reshaped(planner, node, shape_of(source), plan)


def _reshaped(planner: Planner, node: Node, old: Sequence[int], plan: Planned) -> Planned:
    layout = reshaped(plan.layout, old, shape_of(node))
    if layout is None:
        raise NotByPositionError(f"takes positions and classes together ({node})")
    same = layout.features == plan.layout.features
    return Planned(layout, plan.ref if same else planner.reshape(node, plan.ref, layout.features))


@rule("transpose", "swapaxes", "permute", "movedim", "mT")
def permute(planner: Planner, node: Node) -> Planned:
    """The axes in another order."""
    source, plan = planner.source(node)
    found = permuted(plan.layout, _order(node, len(shape_of(source))))
    if found is None:
        raise NotByPositionError(f"puts positions in front of sequences ({node})")
    layout, features = found
    ref = plan.ref
    if features != sorted(features):
        order = (0, 1, *(2 + number for number in features))
        ref = planner.other_call(node, "call_method", "permute", (ref, *order))
    return Planned(layout, ref)


def _order(node: Node, rank: int) -> list[int]:
    order, name = list(range(rank)), op_name(node)
    axes: Any = node.args[1:]
    if name == "permute":
        listed = axes[0] if len(axes) == 1 else axes
        return [axis % rank for axis in listed]
    one, other = (-1, -2) if name == "mT" else axes
    if not isinstance(one, int) or not isinstance(other, int):
        raise NotByPositionError(f"moves several axes at once ({node})")
    if name == "movedim":
        order.insert(other % rank, order.pop(one % rank))
    else:
        order[one % rank], order[other % rank] = other % rank, one % rank
    return order


@rule("expand", "expand_as", "broadcast_to")
def expand(planner: Planner, node: Node) -> Planned:
    """Features of size 1 repeated."""
    source, plan = planner.source(node)
    sizes = shape_of(node)
    kinds = plan.layout.axes
    if len(sizes) != len(kinds) or any(
        kind != FEATURE and old != new for kind, old, new in zip(kinds, shape_of(source), sizes, strict=True)
    ):
        raise NotByPositionError(f"repeats positions ({node})")
    features = [size for kind, size in zip(kinds, sizes, strict=True) if kind == FEATURE]
    ref = planner.other_call(node, "call_method", "expand", (plan.ref, -1, -1, *features))
    return Planned(plan.layout.with_features(features, plan.layout.classes), ref)


@rule("getitem", "narrow", "select")
def index(planner: Planner, node: Node) -> Planned:
    """A slice, an entry of an axis, a new axis; or one of several tensors."""
    source, plan = planner.source(node)
    if isinstance(fake_value(source), (tuple, list)):
        return plan.parts[node.args[1]]  # type: ignore[index]
    items = _items(node, source)
    if any(_is_tensor(item) for item in items):
        return pick_by_position(planner, node, source, plan, items)
    sizes = list(shape_of(source))
    layout, features = _indexed(node, plan.layout, sizes, items)
    ref = plan.ref
    if any(feature != slice(None) for feature in features):
        ref = planner.other_call(node, "call_function", operator.getitem, (ref, (slice(None), slice(None), *features)))
    plain = Planned(layout, ref)
    if all(item is not None for item in items):
        return plain
    # new axes are a reshape of what is left
    middle = _sizes_after(sizes, items)
    return _reshaped(planner, node, middle, Planned(layout, ref))


def _is_tensor(item: Any) -> bool:
    return hasattr(item, "meta") or isinstance(item, list)


def _items(node: Node, source: Node) -> list[Any]:
    """What a call takes of every axis; None for a new one."""
    rank, name = len(shape_of(source)), op_name(node)
    if name in ("narrow", "select"):
        dim = argument(node, 1, "dim")
        items: list[Any] = [slice(None)] * rank
        begin = argument(node, 2, "start" if name == "narrow" else "index")
        items[dim] = begin if name == "select" else slice(begin, begin + argument(node, 3, "length"))
        return items
    index: Any = node.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    given = sum(item is not None and item is not Ellipsis for item in items)
    where = next((i for i, item in enumerate(items) if item is Ellipsis), None)
    rest = [slice(None)] * (rank - given)
    if where is None:
        return items + rest
    return [*items[:where], *rest, *items[where + 1 :]]


def _indexed(node: Node, layout: Layout, sizes: list[int], items: list[Any]) -> tuple[Layout, list[Any]]:
    """The layout after slices and entries, and what to take of the features."""
    features: list[Any] = [slice(None)] * len(layout.features)
    number = len(layout.features) - 1
    plain = [item for item in items if item is not None]
    for axis in reversed(range(len(sizes))):
        item, kind = plain[axis], layout.axes[axis]
        if isinstance(item, int) and not isinstance(item, bool):
            at = item % sizes[axis]
            taken: Layout | None = picked(layout, axis, at)
            if kind == FEATURE:
                features[number] = at
        elif isinstance(item, slice) and item.step in (None, 1):
            begin, end, _ = item.indices(sizes[axis])
            whole = (begin, end) == (0, sizes[axis])
            taken = layout if whole else cut(layout, axis, begin, max(0, end - begin))
            if kind == FEATURE and not whole:
                features[number] = slice(begin, end)
        else:
            taken = None
        if taken is None:
            raise NotByPositionError(f"picks entries in a way that is not understood ({node})")
        number -= kind == FEATURE
        layout = taken
    return layout, features


def _sizes_after(sizes: list[int], items: list[Any]) -> list[int]:
    found = []
    plain = [item for item in items if item is not None]
    for size, item in zip(sizes, plain, strict=True):
        if isinstance(item, slice):
            begin, end, _ = item.indices(size)
            found.append(end - begin)
    return found


@rule("split", "chunk", "tensor_split", "unbind")
def pieces(planner: Planner, node: Node) -> Planned:
    """Pieces of an axis."""
    source, plan = planner.source(node)
    name, layout = op_name(node), plan.layout
    dim = argument(node, 1 if name == "unbind" else 2, "dim", 0) % len(shape_of(source))
    found, begin = [], 0
    number = layout.feature_of(dim)
    for i, part in enumerate(fake_value(node)):
        ref = plan.ref
        if name == "unbind":
            taken = picked(layout, dim, i)
            what: Any = i
        else:
            taken = cut(layout, dim, begin, part.shape[dim])
            what = slice(begin, begin + part.shape[dim])
            begin += part.shape[dim]
        if taken is None:
            raise NotByPositionError(f"takes single positions ({node})")
        if number is not None:
            axes = [slice(None)] * (2 + number)
            ref = planner.other_call(node, "call_function", operator.getitem, (ref, (*axes, what)))
        found.append(Planned(taken, ref))
    return Planned(layout, plan.ref, tuple(found))


def _beside(planner: Planner, node: Node, other: Node, plan: Planned, ours: Node) -> Planned:
    """Another tensor, put beside one of ours: a teacher's log-probabilities."""
    sizes, kinds = shape_of(other), plan.layout.axes
    positions = [size for kind, size in zip(kinds, shape_of(ours), strict=True) if kind != FEATURE]
    if len(sizes) != len(kinds) or positions != [s for kind, s in zip(kinds, sizes, strict=True) if kind != FEATURE]:
        raise NotByPositionError(f"puts logits and other tensors together ({node})")
    features = [size for kind, size in zip(kinds, sizes, strict=True) if kind == FEATURE]
    layout = plan.layout.with_features(features, [False] * len(features))
    return Planned(layout, planner.taken(node, other, layout))


@rule("cat", "concatenate", "stack")
def join(planner: Planner, node: Node) -> Planned:
    """Pieces put together again, or features side by side."""
    tensors: Any = argument(node, 0, "tensors")
    ours = (
        [n for n in tensors if n in planner.behind and differentiable(n)] if isinstance(tensors, (list, tuple)) else []
    )
    if not ours:
        raise NotByPositionError(f"puts tensors together in a way that is not understood ({node})")
    first = planner.plan(ours[0])
    plans = [planner.plan(n) if n in ours else _beside(planner, node, n, first, ours[0]) for n in tensors]
    layouts, refs = [plan.layout for plan in plans], [plan.ref for plan in plans]
    stacks = op_name(node) == "stack"
    dim = argument(node, 1, "dim", 0) % len(shape_of(node))
    alike = all(layout.axes == layouts[0].axes for layout in layouts)
    if stacks and dim == 0 and alike and all(ref == refs[0] for ref in refs):
        found = stacked(layouts)
        if found is not None:
            return Planned(found, refs[0])
    axes = layouts[0].axes
    if not stacks and alike and axes[dim] != FEATURE and all(ref == refs[0] for ref in refs):
        found = joined(layouts, dim)
        if found is not None:
            return Planned(found, refs[0])
    same = alike and all(layout.window == layouts[0].window for layout in layouts)
    number = axes[:dim].count(FEATURE)
    if not same or (not stacks and axes[dim] != FEATURE):
        raise NotByPositionError(f"puts values of other positions side by side ({node})")
    features = list(layouts[0].features)
    marks = [any(marks) for marks in zip(*(layout.classes for layout in layouts), strict=True)]
    kinds = list(axes)
    if stacks:
        features.insert(number, len(plans))
        marks.insert(number, False)
        kinds.insert(dim, FEATURE)
    else:
        features[number] = sum(layout.features[number] for layout in layouts)
    function = torch.stack if stacks else torch.cat
    ref = planner.other_call(node, "call_function", function, (list(refs), 2 + number))
    return Planned(Layout(tuple(kinds), layouts[0].window, tuple(features), tuple(marks)), ref)
