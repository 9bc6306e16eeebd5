"""What is computed of every position, written once: equal calls on equal values are one step, whatever positions."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.fx.node import map_aggregate

from cggr_compile.passes.patterns.token_values.layout import Layout

if TYPE_CHECKING:
    from torch.fx import Node


# In place of the kind of a node: a function of tensors, whose calls are written out.
INLINE = "inline"


class Size(enum.Enum):
    """Sizes that are numbers only where the program is written for some rows."""

    BATCH = "batch"
    ROWS = "rows"


@dataclass(frozen=True)
class Ref:
    """The value of a step: [B, K, features], or several of these."""

    number: int


@dataclass(frozen=True)
class Taken:
    """A value of the graph, of which the rows are taken. ``shape``: what it is expanded to before; None: as it is."""

    node: Node
    layout: Layout
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Drawn:
    """A value [B, S, X] of the hidden state that random numbers go into, of which the rows are taken: dropout."""

    node: Node


@dataclass(frozen=True)
class Constant:
    """A value of the graph that all positions share, in another shape."""

    node: Node
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """A call, with references for values that have rows; other nodes stand for themselves."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stem:
    """What the program is computed from: the hidden state."""


Step = Stem | Taken | Drawn | Constant | Call


class Program:
    """Steps, in an order in which each comes after what it reads. The first is the hidden state.

    Attributes:
        anchors: for each step, the node of the graph in front of which it can be computed, and whose modes it has.
    """

    def __init__(self, place: Callable[[Node], int]) -> None:
        self.steps: list[Step] = []
        self.anchors: list[Node] = []
        self._place = place
        self._known: dict[Any, Ref] = {}

    def add(self, step: Step, anchor: Node, modes: Any) -> Ref:
        """The value of a step, a new one if there is none like it."""
        key = (_key(step), modes)
        ref = self._known.get(key)
        if ref is None:
            ref = self._known[key] = Ref(len(self.steps))
            self.steps.append(step)
            self.anchors.append(anchor)
        elif self._place(anchor) < self._place(self.anchors[ref.number]):
            self.anchors[ref.number] = anchor
        return ref

    def needed(self, refs: list[Ref]) -> list[int]:
        """Numbers of the steps that these values are computed from, in order of their anchors."""
        found: set[int] = set()
        todo = [ref.number for ref in refs]
        while todo:
            number = todo.pop()
            if number not in found:
                found.add(number)
                todo += [ref.number for ref in refs_of(self.steps[number])]
        return sorted(found, key=lambda number: (self._place(self.anchors[number]), number))


def refs_of(step: Step) -> list[Ref]:
    """The values that a step reads."""
    found: list[Ref] = []
    if isinstance(step, Call):

        def see(value: Any) -> Any:
            if isinstance(value, Ref):
                found.append(value)
            return value

        map_aggregate((step.args, step.kwargs), see)
    return found


def _key(step: Step) -> Any:
    if isinstance(step, Call):
        return step.op, step.target, _frozen(step.args), _frozen(step.kwargs)
    return step


def _frozen(value: Any) -> Any:
    if isinstance(value, slice):
        return slice, value.start, value.stop, value.step
    if isinstance(value, (tuple, list)):
        return type(value), *map(_frozen, value)
    if isinstance(value, dict):
        return tuple((name, _frozen(entry)) for name, entry in sorted(value.items()))
    return type(value), value
