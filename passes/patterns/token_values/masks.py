"""At which positions a value's gradient may be other than zero: its readers multiply it with masks, or replace it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cggr_compile.passes.analysis.effects import mutated_operands
from cggr_compile.passes.fx import ancestors
from cggr_compile.passes.nodes import argument, differentiable, fake_value, op_name, shape_of
from cggr_compile.passes.patterns.token_values.layout import FEATURE, Layout
from cggr_compile.passes.patterns.token_values.operands import base_of
from cggr_compile.passes.patterns.token_values.program import Taken
from cggr_compile.passes.patterns.token_values.rules.head_values import NO_LABEL, is_head_of_values, labels_of
from cggr_compile.passes.patterns.token_values.rules.losses import OF_CLASSES, read_loss

if TYPE_CHECKING:
    from collections.abc import Container

    from torch.fx import Node

    from cggr_compile.passes.patterns.token_values.planner import Planner

# Of more ways than this from a value to the loss, none is looked at.
_WAYS = 16
_PRODUCTS = {"mul", "and", "bitwise_and", "logical_and"}


@dataclass(frozen=True)
class Mask:
    """Positions where a tensor is not ``zero`` (``holds``), or where it is."""

    where: Taken
    holds: bool
    zero: int = 0


# The positions where all the masks of a way hold; no masks: every position.
Way = frozenset[Mask]


def ways(planner: Planner, value: Node) -> set[Way]:
    """The positions of a value whose gradient may be other than zero: those of any of the ways from it to the loss."""
    found = _ways(planner, value, {})
    found = {way for way in found if not any(other < way for other in found)}
    return {frozenset()} if len(found) > _WAYS else found


def own_masks(planner: Planner, node: Node, everywhere: Container[Node]) -> Way:
    """The positions where a value's own gradient reaches the logits, as far as calls with one such operand tell.

    A loss of classes has a target that is not ignored; entries of all classes are multiplied with a mask.

    Args:
        everywhere: calls of ``cggr::token_log_probs`` that have a label at every position.
    """
    found: set[Mask] = set()
    while True:
        call = read_loss(node)
        if call is not None and op_name(node) in OF_CLASSES:
            if not call.soft and planner.unwritten(call.target):
                base, at = base_of(call.target, planner.found[node].layout, planner.unwritten)
                found.add(Mask(Taken(base, at, None), True, call.ignore_index))
            return frozenset(found)
        if node in everywhere:
            return frozenset(found)
        if is_head_of_values(node) and planner.unwritten(labels_of(node)):
            base, at = base_of(labels_of(node), planner.found[node].layout, planner.unwritten)
            return frozenset({*found, Mask(Taken(base, at, None), True, NO_LABEL)})
        sources = [n for n in node.all_input_nodes if n in planner.behind and differentiable(n)]
        if len(sources) > 1 and (only := _only_call(planner, sources)) is not None:
            node = only
            continue
        if len(sources) != 1 or node in planner.heads:
            return frozenset(found)
        if node in planner.found and not planner.found[node].parts:
            found |= _hidden_by(planner, node, sources[0])
        node = sources[0]


def _only_call(planner: Planner, sources: list[Node]) -> Node | None:
    """The call of the operator that all of these are computed from, and not from the hidden state in another way."""
    calls = [n for n in ancestors(sources, only=planner.behind.__contains__) if is_head_of_values(n)]
    beside = ancestors(sources, stop=calls, only=planner.behind.__contains__)
    return calls[0] if len(calls) == 1 and planner.stem not in beside else None


def _hidden_by(planner: Planner, reader: Node, node: Node) -> set[Mask]:
    """The masks that a reader multiplies a value with, or chooses by."""
    layout, shape, found = planner.found[reader].layout, shape_of(reader), set[Mask]()
    if op_name(reader) == "mul":
        for factor in reader.all_input_nodes:
            found |= _masks(planner, factor, layout, shape, True) if factor is not node else set()
    elif op_name(reader) in ("where", "masked_fill"):
        found |= _chosen(planner, reader, node, layout, shape)
    return found


def _ways(planner: Planner, node: Node, known: dict[Node, set[Way]]) -> set[Way]:
    if node in known:
        return known[node]
    known[node] = {frozenset()}  # a loop cannot be
    plan = planner.get(node)
    found: set[Way] = set()
    written: Way = frozenset()
    for user in node.users:
        if user.op == "output":
            found.add(frozenset())
        elif mutated_operands(user):
            mask = _overwritten(planner, user, node)
            if mask is None:
                found.add(frozenset())
            else:
                written |= {mask}
        elif differentiable(user):
            found |= _through(planner, user, node, known) if plan is not None else {frozenset()}
    known[node] = {way | written for way in found}
    return known[node]


def _through(planner: Planner, user: Node, node: Node, known: dict[Node, set[Way]]) -> set[Way]:
    """The ways that begin with one reader."""
    plan = planner.get(user)
    if plan is None:
        return {frozenset()}
    if plan.parts:
        return _ways(planner, user, known)
    here = _hidden_by(planner, user, node)
    return {way | here for way in _ways(planner, user, known)}


def _chosen(planner: Planner, user: Node, node: Node, layout: Layout, shape: Any) -> set[Mask]:
    if op_name(user) == "where":
        by_method = user.op == "call_method"
        first, condition, second = (
            (user.args[0], user.args[1], user.args[2]) if by_method else (user.args[1], user.args[0], user.args[2])
        )
        sides = [holds for side, holds in ((first, True), (second, False)) if side is node]
        if len(sides) != 1:
            return set()
        return _masks(planner, condition, layout, shape, sides[0])
    if user.args[0] is not node:
        return set()
    return _masks(planner, argument(user, 1, "mask"), layout, shape, False)


def _masks(planner: Planner, mask: Any, layout: Layout, shape: Any, holds: bool) -> set[Mask]:
    """The masks that a factor or condition is, or is a product of."""
    if hasattr(mask, "meta") and mask in planner.behind and op_name(mask) in _PRODUCTS and holds:
        return {m for n in mask.all_input_nodes for m in _masks(planner, n, layout, shape, True)}
    found = _mask(planner, mask, layout, shape, holds)
    return set() if found is None else {found}


def _mask(planner: Planner, mask: Any, layout: Layout, shape: Any, holds: bool) -> Mask | None:
    """A tensor without gradient that has an entry per position, as a mask."""
    value = fake_value(mask) if hasattr(mask, "meta") else None
    if not isinstance(value, torch.Tensor) or differentiable(mask) or mask in planner.behind:
        return None
    if not planner.unwritten(mask):
        return None
    sizes, lead = shape_of(mask), len(shape) - value.dim()
    kinds = layout.axes[lead:]
    if lead < 0 or any(kind == FEATURE and size != 1 for kind, size in zip(kinds, sizes, strict=True)):
        return None
    if not any(kind != FEATURE and size != 1 for kind, size in zip(kinds, sizes, strict=True)):
        return None
    features = tuple(size for kind, size in zip(kinds, sizes, strict=True) if kind == FEATURE)
    own = Layout(layout.axes[:lead] + kinds, layout.window, features, (False,) * len(features))
    if lead and any(kind == FEATURE for kind in layout.axes[:lead]):
        return None
    whole = tuple(
        [full for kind, full in zip(layout.axes[:lead], shape[:lead], strict=True)]
        + [size if kind == FEATURE else full for kind, size, full in zip(kinds, sizes, shape[lead:], strict=True)]
    )
    spread = None if whole == sizes else whole
    if spread is not None:
        return Mask(Taken(mask, own, spread), holds)
    base, at = base_of(mask, own, planner.unwritten)
    return Mask(Taken(base, at, None), holds)


def _overwritten(planner: Planner, write: Node, node: Node) -> Mask | None:
    """The mask of ``x[mask] = number``, written before anything else reads ``x``; None for any other write."""
    if write.target is not operator.setitem or write.args[0] is not node or write.users:
        return None
    if any(planner.order[user] < planner.order[write] for user in node.users if user is not write):
        return None
    index, value = write.args[1], write.args[2]
    if not hasattr(index, "meta") or (hasattr(value, "meta") and differentiable(value)):
        return None
    plan = planner.get(node)
    is_bool = fake_value(index).dtype == torch.bool and shape_of(index) == shape_of(node)
    return _mask(planner, index, plan.layout, shape_of(node), False) if is_bool and plan is not None else None
