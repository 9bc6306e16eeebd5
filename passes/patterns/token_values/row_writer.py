"""Writes a program for the selected rows: of dropout what was drawn, and where each row lies among the values."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch

from cggr_compile.passes.facts import Selection
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.patterns.tail import rows_of
from cggr_compile.passes.patterns.token_values.layout import Window
from cggr_compile.passes.patterns.token_values.writer import ProgramWriter

if TYPE_CHECKING:
    from torch.fx import Node


class RowWriter(ProgramWriter):
    """Writes a program for the selected rows; see :class:`ProgramWriter`."""

    def __init__(self, emit: Emitter, begin: Node, selection: Selection, hidden: Node, first: int, origin: str) -> None:
        super().__init__(emit, begin, hidden, selection.rows, first, origin)
        self.selection = selection
        self._places: dict[Window, tuple[Node, Node]] = {}

    def drawn(self, node: Node, anchor: Node) -> Node:
        with self.emit.before(anchor if self.begin < anchor else self.begin, self.origin):
            return rows_of(self.emit, node, self.selection, self.first)

    def places(self, window: Window) -> tuple[Node, Node]:
        """Of each slot: its row among those of a window, int64 [B, K], and its weight, 0 where it has none."""
        if window not in self._places:
            index = self.flat(window)
            with self.emit.before(self.begin, self.origin):
                weights = self.emit.call(torch.where, self._inside(window), self.selection.weights, 0.0)
            self._places[window] = index, weights
        return self._places[window]

    def _inside(self, window: Window) -> Node:
        """bool [B, K]: the slots that are used and have a row in the window."""
        emit, rows = self.emit, self.selection.rows
        found = self.selection.keep
        start, sequence = self.first + window.start, self.sequence(window)
        terms = [emit.call(operator.ge, rows, start), emit.call(operator.lt, rows, start + window.length)]
        if window.first or window.count != self.batch:
            terms += [emit.call(operator.ge, sequence, 0), emit.call(operator.lt, sequence, window.count)]
        if not window.full:
            flat = emit.call(operator.sub, emit.call(operator.mul, sequence, window.length), start)
            flat = emit.call(operator.add, flat, rows)
            terms += [
                emit.call(operator.ge, flat, window.begin),
                emit.call(operator.lt, flat, window.begin + window.size),
            ]
        for term in terms:
            found = emit.call(operator.and_, found, term)
        return found
