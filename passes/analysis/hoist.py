"""Brings values in front of an earlier place of the graph: moves what computes them, or copies it, or says why not."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Graph, Node

from cggr_compile import compat
from cggr_compile.passes.analysis.effects import draws, memory, mutated_operands, overlap
from cggr_compile.passes.analysis.modes import cast_as, modes_of
from cggr_compile.passes.fx import Emitter, ancestors
from cggr_compile.passes.nodes import fake_value, op_name


class Hoist:
    """What may be computed in front of ``anchor``, and how.

    A value is the same there if nothing from there to its own place writes to the memory that it is computed from,
    nor to its own up to the place where it is read, and no random number is drawn. Then its nodes move, if they also
    run in the same modes there::

        with autocast: x1 = block(x0)                           with autocast: x1 = block(x0)
        ----- anchor                                            w = weight * 2
        ...                                                     ----- anchor
        w = weight * 2
        logits = linear(h, w)                                   logits = linear(h, w)

    Otherwise they are copied, detached, under the autocast that the originals run in; the originals stay::

        -----  anchor                                           f1 = 1 / weight.norm()
        ...                                                     ----- anchor
        with no_grad: f = 1 / weight.norm()                     with no_grad: f = 1 / weight.norm()

    Grad mode makes no difference to what has no gradient in any mode, autocast none to integers.
    """

    def __init__(self, graph: Graph, anchor: Node) -> None:
        self.anchor = anchor
        self.modes = modes_of(graph)
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._writes = [(self._order[n], n, memory(o)) for n in graph.nodes for o in mutated_operands(n)]
        # what is no write to memory, and yet changes what autograd makes of later nodes
        self._writes += [(i, n, memory(n)) for n, i in self._order.items() if n.target == "requires_grad_"]

    def obstacle(self, node: Node, reader: Node, later: Collection[Node] = ()) -> str:
        """Why the value that ``reader`` gets from ``node`` cannot be had in front of the anchor; empty if it can.

        Args:
            later: nodes that are not to be computed any earlier.
        """
        here = self.modes[self.anchor]
        for n in self._missing(node):
            modes = self.modes[n]
            if n is self.anchor or n in later:
                return f"{node} depends on {n}, which is computed later"
            if n.op == "call_module" or mutated_operands(n):
                return f"{node} is computed with {op_name(n)!r} ({n}), which writes in place"
            if draws(n):
                return f"{node} is computed with {op_name(n)!r} ({n}), which draws random numbers"
            if modes.levels != here.levels:
                return f"{node} is computed with {n}, inside of a function under torch.vmap"
            if modes.unknown is not here.unknown and n.op != "get_attr":
                behind = op_name(modes.unknown or here.unknown)  # type: ignore[arg-type]
                return f"{node} is computed behind {behind!r}, whose effect on it is unknown"
            for source in (*n.all_input_nodes, n):
                if (write := self._write(source, n)) is not None:
                    return _told(node, write)
        write = self._write(node, reader)
        return "" if write is None else _told(node, write)

    def bring(self, emit: Emitter, node: Node, origin: str) -> Node:
        """``node`` or a copy of it, in front of the anchor. Only without an obstacle."""
        copies: dict[Node, Node] = {}
        for n in self._missing(node):
            if self._same_there(n) and copies.keys().isdisjoint(n.all_input_nodes):
                self.anchor.prepend(n)
                continue
            with emit.before(self.anchor, origin), emit.under(cast_as(emit.modes, self.modes[n])):
                copies[n] = emit.copy(n, copies)
        if node not in copies:
            return node
        value = fake_value(copies[node])
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return copies[node]
        with emit.before(self.anchor, origin):
            return emit.method("detach", copies[node])

    def _missing(self, node: Node) -> list[Node]:
        """What ``node`` needs and is not there yet at the anchor, in order."""
        begin = self._order[self.anchor]
        missing = (n for n in ancestors([node]) if self._order.get(n, -1) >= begin and not self._moved(n))
        return sorted(missing, key=self._order.__getitem__)

    def _moved(self, node: Node) -> bool:
        return node is not self.anchor and node < self.anchor

    def _write(self, node: Node, reader: Node) -> Node | None:
        """The first write, from the anchor to ``reader``, to what ``node`` lies in."""
        begin, end, own = self._order[self.anchor], self._order[reader], memory(node)
        inside = (n for i, n, written in self._writes if begin <= i < end and overlap(written, own))
        return next(inside, None)

    def _same_there(self, node: Node) -> bool:
        """Whether value and gradient of a node are the same in the anchor's modes."""
        mine, there = self.modes[node], self.modes[self.anchor]
        if node.op == "get_attr":
            return True
        if there.inference and not mine.inference:
            return False
        if mine.records != there.records and any(_has_gradient(n) for n in node.all_input_nodes):
            return False
        floats = any(_is_float(n) for n in (*node.all_input_nodes, node))
        return not (floats and mine.casts_unlike(there))


def _told(node: Node, write: Node) -> str:
    return f"{op_name(write)!r} ({write}) writes in place to what {node} is computed from"


def _tensors(node: Node) -> list[torch.Tensor]:
    value = fake_value(node)
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return [compat.unwrapped(t) for t in tensors if isinstance(t, torch.Tensor)]


def _has_gradient(node: Node) -> bool:
    return any(t.requires_grad for t in _tensors(node))


def _is_float(node: Node) -> bool:
    return any(t.is_floating_point() or t.is_complex() for t in _tensors(node))
