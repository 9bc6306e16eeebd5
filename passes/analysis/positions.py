"""Sets of positions along the tokens, given by conditions: written as a mask, or read off the first batch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cggr_compile import compat
from cggr_compile.passes.base import GraphContext
from cggr_compile.passes.facts import FinalStates
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value, shape_of
from cggr_compile.passes.patterns.mask_program import MaskProgram, Undecided

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

# Most bytes of inputs that are copied to the CPU to compute a mask for the first batch: ids and masks, no weights.
_CHEAP = 1 << 26


@dataclass(frozen=True)
class Flags:
    """Positions where ``node`` is not zero: [n, ...], [1, n, ...] or [B, n, ...], the tokens on ``axis``.

    Entry i is position ``first + i``. Features behind, if there are any, are taken together.
    """

    node: Node
    axis: int
    first: int

    @property
    def inputs(self) -> tuple[Node, ...]:
        return (self.node,)


@dataclass(frozen=True)
class Listed:
    """Positions that ``node`` names: integers [P], counted from ``first``."""

    node: Node
    first: int

    @property
    def inputs(self) -> tuple[Node, ...]:
        return (self.node,)


@dataclass(frozen=True)
class Holding:
    """Positions whose entry of ``index`` (integers, [n], [1, n] or [B, n]; entry i is ``first + i``) is among ``rows``.

    ``rows`` is a part of a table of ``size`` rows.
    """

    index: Node
    axis: int
    first: int
    rows: Region
    size: int

    @property
    def inputs(self) -> tuple[Node, ...]:
        return (self.index, *self.rows.inputs)


Condition = Flags | Listed | Holding


@dataclass(frozen=True)
class Region:
    """The positions from ``begin`` to ``end`` (None: the last) where every condition holds, or does not if False."""

    begin: int = 0
    end: int | None = None
    conditions: tuple[tuple[Condition, bool], ...] = ()

    def within(self, begin: int, end: int | None) -> Region:
        ends = [e for e in (self.end, end) if e is not None]
        return replace(self, begin=max(self.begin, begin), end=min(ends) if ends else None)

    def where(self, condition: Condition, holds: bool = True) -> Region:
        if (condition, holds) in self.conditions:
            return self
        return replace(self, conditions=(*self.conditions, (condition, holds)))

    def covers(self, other: Region) -> bool:
        """Whether it has every position of ``other``, as far as the conditions themselves say."""
        ends_later = self.end is None or (other.end is not None and other.end <= self.end)
        return self.begin <= other.begin and ends_later and set(self.conditions) <= set(other.conditions)

    @property
    def whole(self) -> bool:
        return self.covers(WHOLE)

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes that it is computed from."""
        return tuple(node for condition, _ in self.conditions for node in condition.inputs)

    def __str__(self) -> str:
        text = "all positions" if self.begin == 0 and self.end is None else f"positions {self.begin} to "
        text += "" if text.startswith("all") else ("the last" if self.end is None else str(self.end - 1))
        named = [f"{'' if holds else 'not '}{condition.inputs[0]}" for condition, holds in self.conditions]
        return f"{text} where {' and '.join(named)}" if named else text


WHOLE = Region()


def static_count(regions: Sequence[Region], length: Any) -> int | None:
    """How many positions the regions have together; None if that depends on data."""
    found: set[int] = set()
    for region in regions:
        end = length if region.end is None else region.end
        if region.conditions or not isinstance(end, int):
            return None
        found.update(range(region.begin, end))
    return len(found)


def union(emit: Emitter, regions: Sequence[Region], batch: int | Node, length: int | Node, device: Any) -> Node:
    """The regions as one mask, bool [batch, length]."""
    masks = [_mask(emit, region, length, device) for region in dict.fromkeys(regions)]
    found = masks[0]
    for mask in masks[1:]:
        found = emit.call(operator.or_, found, mask)
    return emit.method("expand", found, batch, length)


def _mask(emit: Emitter, region: Region, length: int | Node, device: Any) -> Node:
    """bool [length], or with the batch in front."""
    place = emit.call(torch.arange, length, device=device)
    terms = [emit.call(operator.ge, place, region.begin)]
    if region.end is not None:
        terms.append(emit.call(operator.lt, place, region.end))
    for condition, holds in region.conditions:
        # where features differ, some of them may act on both sides
        together = "any" if holds else "all"
        term = _condition(emit, condition, place, length, device, together)
        terms.append(term if holds else emit.call(torch.logical_not, term))
    found = terms[0]
    for term in terms[1:]:
        found = emit.call(operator.and_, found, term)
    return found


def _condition(
    emit: Emitter, condition: Condition, place: Node, length: int | Node, device: Any, together: str
) -> Node:
    if isinstance(condition, Listed):
        return emit.call(torch.isin, emit.call(operator.sub, place, condition.first), condition.node)
    if isinstance(condition, Flags):
        flags = condition.node
    else:
        rows = _mask(emit, condition.rows, condition.size, device)
        flags = emit.call(operator.getitem, rows, condition.index)
    if fake_value(flags).dtype != torch.bool:
        flags = emit.call(operator.ne, flags, 0)
    axis, size = condition.axis, shape_of(flags)[condition.axis]
    if len(shape_of(flags)) > axis + 1:
        flags = emit.method(together, emit.method("flatten", flags, axis + 1), -1)
    if isinstance(length, int) and (condition.first, size) == (0, length):
        return flags
    behind = emit.minus(length, condition.first + size)
    return emit.call(torch.nn.functional.pad, flags, (condition.first, behind), "constant", False)


class FirstBatch:
    """Values of masks for the batch that the graph is captured with."""

    def __init__(self, gm: GraphModule, ctx: GraphContext) -> None:
        self.gm, self.ctx = gm, ctx
        states = ctx[FinalStates].states
        self.batch, self.length = shape_of(states)[:2]
        self.device = fake_value(states).device

    def read(self, regions: Sequence[Region]) -> Tensor | str:
        """The regions as one mask, bool [B, S] on the CPU; or why that cannot be computed."""
        if not isinstance(self.batch, int) or not isinstance(self.length, int):
            return "sizes are symbolic"
        batch, length = self.batch, self.length
        place = self.gm.graph.output_node()
        return self.computed(lambda emit: union(emit, regions, batch, length, self.device), place)

    def computed(self, make: Callable[[Emitter], Node], place: Node) -> Tensor | str:
        """:meth:`value` of what ``make`` emits in front of ``place``; the graph stays as it is."""
        before = set(self.gm.graph.nodes)
        emit = Emitter(self.gm.graph, self.ctx.fake_mode)
        try:
            with emit.before(place, "first_batch"):
                node = make(emit)
            return self.value(node)
        finally:
            for node in reversed([n for n in self.gm.graph.nodes if n not in before]):
                self.gm.graph.erase_node(node)

    def value(self, node: Node) -> Tensor | str:
        """A small tensor that only ids, masks and sizes go into, on the CPU; or why that cannot be computed."""
        try:
            program = MaskProgram.of(node, [node])
            return program.run({}, {n: self._example(n) for n in self._cheap(program)})
        except Undecided as undecided:
            return str(undecided)

    def _cheap(self, program: MaskProgram) -> tuple[Node, ...]:
        size = sum(v.numel() * v.element_size() for v in map(fake_value, program.inputs) if isinstance(v, Tensor))
        if size > _CHEAP:
            raise Undecided(f"{program.mask} is computed from {size >> 20} MiB")
        return program.inputs

    def _example(self, node: Node) -> Tensor:
        if node.op == "get_attr":
            value = getattr(self.gm, str(node.target), None)
        else:
            value = self.ctx.example_inputs[self.gm.graph.find_nodes(op="placeholder").index(node)]
        if not isinstance(value, Tensor) or compat.is_fake(value) or value.is_meta:
            raise Undecided("the capture gives no example tensors")
        return value.detach().cpu()
