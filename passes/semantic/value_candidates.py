"""Which positions may be selected where the loss is made of per-token values, and what they predict."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from cggr_compile.passes.analysis.hoist import Hoist
from cggr_compile.passes.analysis.positions import FirstBatch
from cggr_compile.passes.base import GraphContext
from cggr_compile.passes.facts import Candidates, FinalStates, TokenValues
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value, shape_of
from cggr_compile.passes.patterns.token_values.layout import FLAT, Layout, Window
from cggr_compile.passes.patterns.token_values.program import Taken

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from cggr_compile.passes.patterns.token_values.masks import Mask, Way

NO_LABEL = -100


def candidates_of_first_batch(gm: GraphModule, ctx: GraphContext) -> Tensor | str:
    """The candidates of the batch that the graph is captured with, bool [B, S] on the CPU; or why they are unknown."""
    place = gm.graph.output_node()

    def make(emit: Emitter) -> Node:
        return ValueCandidates(emit, ctx, Hoist(gm.graph, place), "first_batch").candidates().valid

    return FirstBatch(gm, ctx).computed(make, place)


def streams(ctx: GraphContext) -> frozenset[Node]:
    """What is not to be computed any earlier, whatever depends on it: the residual streams of all forwards."""
    return frozenset().union(*(final.stream for final in ctx.every(FinalStates)))


class ValueCandidates:
    """Emits candidates in front of a place of the graph.

    A position is one where, for any value, the masks of one way to the loss hold. Masks that cannot be known there
    are left out, so that there may be more candidates than positions with a gradient, never fewer.
    """

    def __init__(self, emit: Emitter, ctx: GraphContext, hoist: Hoist, origin: str) -> None:
        self.emit, self.ctx, self.hoist, self.origin = emit, ctx, hoist, origin
        self.values, final = ctx[TokenValues], ctx[FinalStates]
        self.batch, self.length = shape_of(final.states)[:2]
        self.first = final.tail_start
        self.device = fake_value(self.values.stem).device
        self._masks: dict[Mask, Node | None] = {}
        self._windows: dict[Window, Node] = {}
        self.unknown: list[str] = []

    def candidates(self) -> Candidates:
        values = self.values
        terms = [
            term
            for layout, ways in zip(values.layouts, values.masks, strict=True)
            for term in self._of_value(layout, ways)
        ]
        target = self._target()
        with self.emit.before(self.hoist.anchor, self.origin):
            valid = self._joined(operator.or_, terms)
            if target is None:
                target = self._full(NO_LABEL, torch.int64)
            else:
                target = self.emit.call(torch.where, valid, target, NO_LABEL)
        return Candidates(target, valid, self.hoist.anchor)

    def _of_value(self, layout: Layout, ways: frozenset[Way]) -> list[Node]:
        found = []
        for way in ways:
            masks = [node for mask in sorted(way, key=str) if (node := self._mask(mask)) is not None]
            with self.emit.before(self.hoist.anchor, self.origin):
                found.append(self._joined(operator.and_, [self._window(layout), *masks]))
        return found

    def _joined(self, function: Any, terms: list[Node]) -> Node:
        if not terms:
            return self._full(False, torch.bool)
        terms = list(dict.fromkeys(terms))
        found = terms[0]
        for term in terms[1:]:
            found = self.emit.call(function, found, term)
        return found

    def _mask(self, mask: Mask) -> Node | None:
        """bool [B, S]; None where it cannot be known yet."""
        if mask not in self._masks:
            found = self._brought(mask.where)
            if found is not None:
                with self.emit.before(self.hoist.anchor, self.origin):
                    if fake_value(found).dtype != torch.bool or mask.zero:
                        compare = operator.ne if mask.holds else operator.eq
                        found = self.emit.call(compare, found, mask.zero)
                    elif not mask.holds:
                        found = self.emit.call(torch.logical_not, found)
                    found = self.whole(found, mask.where.layout, False)
            self._masks[mask] = found
        return self._masks[mask]

    def _target(self) -> Node | None:
        labels = self.values.labels
        found = self._brought(labels) if labels is not None else None
        if labels is None or found is None:
            return None
        with self.emit.before(self.hoist.anchor, self.origin):
            if fake_value(found).dtype != torch.int64:
                found = self.emit.method("long", found)
            return self.whole(found, labels.layout, NO_LABEL)

    def _brought(self, taken: Taken) -> Node | None:
        node = taken.node
        if obstacle := self.hoist.obstacle(node, node, streams(self.ctx)):
            self.unknown.append(obstacle)
            return None
        found = self.hoist.bring(self.emit, node, self.origin)
        if taken.shape is None:
            return found
        with self.emit.before(self.hoist.anchor, self.origin):
            return self.emit.method("expand", found, *taken.shape)

    def _window(self, layout: Layout) -> Node:
        """bool [B, S]: the positions that a value has."""
        window = layout.window
        if window not in self._windows:
            sizes = (window.size,) if not window.full else (window.count, window.length)
            ones = self.emit.call(torch.ones, sizes, dtype=torch.bool, device=self.device)
            axes = layout.axes if window.full else (FLAT,)
            self._windows[window] = self.whole(ones, Layout(axes, window, (), ()), False)
        return self._windows[window]

    def whole(self, node: Node, layout: Layout, fill: Any) -> Node:
        """A tensor with one entry per position of its window, [B, S]."""
        window, pad = layout.window, torch.nn.functional.pad
        if not window.full:
            flat = self.emit.method("reshape", node, window.size)
            rest = window.count * window.length - window.begin - window.size
            node = self.emit.call(pad, flat, (window.begin, rest), "constant", fill)
        node = self.emit.method("reshape", node, window.count, window.length)
        start = self.first + window.start
        ends = (start, self.length - start - window.length)
        sequences = (window.first, self.batch - window.first - window.count)
        if any(ends) or any(sequences):
            node = self.emit.call(pad, node, (*ends, *(sequences if any(sequences) else ())), "constant", fill)
        return node

    def _full(self, value: Any, dtype: torch.dtype) -> Node:
        return self.emit.call(torch.full, (self.batch, self.length), value, dtype=dtype, device=self.device)
