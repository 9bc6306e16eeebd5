"""Writes a program for some rows, and brings values into the layouts of the graph and back."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.node import map_aggregate

from cggr_compile.passes.analysis.modes import cast_as, modes_of
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value, shape_of
from cggr_compile.passes.patterns.token_values.layout import FEATURE, Layout, Window
from cggr_compile.passes.patterns.token_values.program import (
    INLINE,
    Call,
    Constant,
    Drawn,
    Program,
    Ref,
    Size,
    Stem,
    Taken,
)

if TYPE_CHECKING:
    from torch.fx import Node


def tokens_first(emit: Emitter, node: Node, layout: Layout) -> Node:
    """A value as [N, features]."""
    order = _order(layout)
    if order != sorted(order):
        node = emit.method("permute", node, order)
    return emit.method("reshape", node, [layout.window.size, *layout.features])


def as_before(emit: Emitter, node: Node, layout: Layout, shape: Any) -> Node:
    """The inverse of :func:`tokens_first`."""
    order = _order(layout)
    node = emit.method("reshape", node, [shape[axis] for axis in order])
    if order == sorted(order):
        return node
    return emit.method("permute", node, [order.index(axis) for axis in range(len(order))])


def _order(layout: Layout) -> list[int]:
    tokens = [axis for axis, kind in enumerate(layout.axes) if kind != FEATURE]
    return [*tokens, *(axis for axis, kind in enumerate(layout.axes) if kind == FEATURE)]


class ProgramWriter:
    """Writes a program for some rows, each step in front of the node that it was planned for, or of ``begin``.

    Args:
        begin: the node of the graph in front of which the rows are known; a step planned earlier goes there, under the
            autocast of its own place.
        hidden: [B, K, H], the hidden state at the rows.
        positions: int64 [B, K], counted from ``first`` positions before the hidden state's first.
    """

    def __init__(self, emit: Emitter, begin: Node, hidden: Node, positions: Node, first: int, origin: str) -> None:
        self.emit, self.begin, self.origin = emit, begin, origin
        self.hidden, self.positions, self.first = hidden, positions, first
        self.batch, self.slots = shape_of(positions)
        self._indices: dict[Window, tuple[Node, Node]] = {}
        self._sequences: Node | None = None

    def write(self, program: Program, refs: list[Ref]) -> dict[Ref, Node]:
        """The values of these steps."""
        found: dict[Ref, Node] = {}
        for number in program.needed(refs):
            step, anchor = program.steps[number], program.anchors[number]
            if isinstance(step, Stem):
                found[Ref(number)] = self.hidden
            elif isinstance(step, Taken):
                found[Ref(number)] = self._taken(step, anchor)
            elif isinstance(step, Drawn):
                found[Ref(number)] = self.drawn(step.node, anchor)
            elif isinstance(step, Constant):
                with self._at(anchor):
                    found[Ref(number)] = self.emit.method("reshape", step.node, step.shape)
            else:
                with self._at(anchor):
                    found[Ref(number)] = self._call(step, found)
        return found

    @contextmanager
    def _at(self, anchor: Node) -> Iterator[None]:
        """Insert in front of ``anchor``, if rows are known there."""
        late = anchor < self.begin
        with self.emit.before(self.begin if late else anchor, self.origin):
            modes = cast_as(self.emit.modes, modes_of(self.emit.graph)[anchor]) if late else self.emit.modes
            with self.emit.under(modes):
                yield

    def _call(self, step: Call, found: dict[Ref, Node]) -> Node:
        def filled(value: Any) -> Any:
            if isinstance(value, Ref):
                return found[value]
            if isinstance(value, Size):
                return self.batch if value is Size.BATCH else self.slots
            return value

        args, kwargs = map_aggregate((step.args, step.kwargs), filled)
        if step.op == INLINE:
            proxies = map_aggregate((args, kwargs), lambda value: self.emit.proxy(value))
            return self.emit.node(step.target(*proxies[0], **proxies[1]))
        if step.op == "call_method":
            return self.emit.method(step.target, *args, **kwargs)
        return self.emit.call(step.target, *args, **kwargs)

    def _taken(self, step: Taken, anchor: Node) -> Node:
        """[B, K, features]."""
        layout = step.layout
        index = (self.flat(layout.window),) if layout.flat else self._index(layout.window)
        with self._at(anchor):
            node = step.node if step.shape is None else self.emit.method("expand", step.node, *step.shape)
            order = _order(layout)
            if order != sorted(order):
                node = self.emit.method("permute", node, order)
            return self.emit.call(operator.getitem, node, index)

    def drawn(self, node: Node, anchor: Node) -> Node:
        """[B, K, X] of a value [B, S, X] with its gradient, in front of ``anchor``; here of all positions."""
        return node

    def sequence(self, window: Window) -> Node:
        """int64 [B, 1]: of each row of a selection, the sequence, counted from the window's first."""
        if self._sequences is None:
            device = fake_value(self.positions).device
            sequences = self.emit.call(torch.arange, self.batch, device=device)
            self._sequences = self.emit.method("unsqueeze", sequences, 1)
        if window.first == 0:
            return self._sequences
        return self.emit.call(operator.sub, self._sequences, window.first)

    def _index(self, window: Window) -> tuple[Node, Node]:
        """Where the rows lie in [B, S, ...]: sequence and position; anywhere, where they do not."""
        if window not in self._indices:
            with self.emit.before(self.begin, self.origin):
                sequence, position = self.sequence(window), self.positions
                if window.first or window.count != self.batch:
                    sequence = self.emit.method("clamp", sequence, 0, window.count - 1)
                if start := self.first + window.start:
                    position = self.emit.call(operator.sub, position, start)
                position = self.emit.method("clamp", position, 0, window.length - 1)
            self._indices[window] = sequence, position
        return self._indices[window]

    def flat(self, window: Window) -> Node:
        """Where the rows lie in [N, ...], int64 [B, K]; anywhere, where they do not."""
        sequence, position = self._index(window)
        with self.emit.before(self.begin, self.origin):
            flat = self.emit.call(operator.add, self.emit.call(operator.mul, sequence, window.length), position)
            if window.full:
                return flat
            if window.begin:
                flat = self.emit.call(operator.sub, flat, window.begin)
            return self.emit.method("clamp", flat, 0, window.size - 1)
