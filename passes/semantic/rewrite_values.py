"""Takes the gradient of per-token values at the selected rows; the values themselves stay exact at every position."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import LayerStack, LossSite, Selection, TokenValues
from cggr_compile.passes.fx import Emitter, descendants
from cggr_compile.passes.nodes import fake_value, shape_of
from cggr_compile.passes.patterns.tail import copy_tail, gather_rows, rows_of
from cggr_compile.passes.patterns.token_values.layout import Layout, Window
from cggr_compile.passes.patterns.token_values.region import TokenRegion, plan_region
from cggr_compile.passes.patterns.token_values.writer import ProgramWriter, as_before, tokens_first

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


class RewriteValues(SemanticPass):
    """Computes per-token values once more, of the selected rows, for their gradient.

    Before::

        logits = linear(norm(x), lm_head)[:, :-1]                                     # [B, S - 1, V]
        chosen = log_softmax(logits, -1).gather(-1, labels[:, 1:, None])             # [B, S - 1, 1]
        loss = -(chosen.squeeze(-1) * mask).sum() / mask.sum()

    After::

        h = cggr.gather_rows(x, rows, keep)                                           # [B, K, H]
        t = labels[arange(B)[:, None], (rows + 1).clamp(0, S - 1)]                    # [B, K]
        own = log_softmax(linear(norm(h), lm_head), -1).gather(2, t[:, :, None])      # [B, K, 1]
        ...                                                                           # as before, to chosen
        placed = cggr.place_values(chosen.detach().view(-1, 1), own, index, factors).view(B, S - 1, 1)
        loss = -(placed.squeeze(-1) * mask).sum() / mask.sum()

    ``index`` says where each row is among the positions, ``factors`` are the weights of those that are selected and
    have a position there. Loss and values are those of the graph as it was captured; the gradient of a value is taken
    at selected rows, times 1/p where they are sampled.

    The values of all positions cost a forward of the head, a third of what it costs densely, whatever part of the
    positions is selected; nothing of it is kept for the backward pass. Where the user, a library's head or
    ``lower_values`` calls ``cggr::token_log_probs``, that is both the exact values and the program of the rows, without
    logits.
    """

    name = "rewrite_values"
    needs = (LossSite, LayerStack, Selection)
    uses = (TokenValues,)

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        found = ctx.get(TokenValues)
        if found is None:
            return PassResult(False, "the loss is one cross-entropy")
        stack, loss, selection = ctx[LayerStack], ctx[LossSite], ctx[Selection]
        region = plan_region(gm.graph, found.stem, found.heads)
        assert region.values == found.values
        emit = Emitter(gm.graph, ctx.fake_mode)
        last = stack.blocks[-1].output
        readers = [*stack.tail, *(node for node in gm.graph.nodes if node in last.users)]
        taken = gather_rows(emit, last, readers, selection, self.name)
        rows = copy_tail(emit, stack, loss, taken, in_place=True)[found.stem]
        writer = _RowWriter(emit, region, selection, rows, stack.tail_start, self.name)
        inside = {*region.planner.found}
        refs = [region.planner.found[node].ref for node in region.values]
        written = writer.write(region.planner.program, refs)
        for node, ref in zip(region.values, refs, strict=True):
            self._place(emit, writer, node, region.layout(node), written[ref], inside, region)
        text = f"{len(region.values)} values: {len(written)} steps on rows"
        return PassResult(True, text, {"values": [str(node) for node in region.values]})

    def _place(
        self,
        emit: Emitter,
        writer: _RowWriter,
        node: Node,
        layout: Layout,
        values: Node,
        inside: set[Node],
        region: TokenRegion,
    ) -> None:
        # not those on the way to further logits
        only = inside.__contains__
        readers = [user for user in node.users if descendants([user], only=only).isdisjoint(region.logits)]
        with emit.before(node.next, self.name):
            exact = tokens_first(emit, emit.method("detach", node), layout)
            index, factors = writer.places(layout.window)
            if fake_value(values).dtype != fake_value(node).dtype:
                values = emit.method("to", values, fake_value(node).dtype)
            placed = emit.call(torch.ops.cggr.place_values.default, exact, values, index, factors)
            placed = as_before(emit, placed, layout, shape_of(node))
        for user in readers:
            user.replace_input_with(node, placed)


class _RowWriter(ProgramWriter):
    """Writes a program for the selected rows."""

    def __init__(
        self, emit: Emitter, region: TokenRegion, selection: Selection, hidden: Node, first: int, origin: str
    ) -> None:
        super().__init__(emit, region.stem.next, hidden, selection.rows, first, origin)
        self.selection = selection
        self._places: dict[Window, tuple[Node, Node]] = {}

    def drawn(self, node: Node, anchor: Node) -> Node:
        with self.emit.before(anchor, self.origin):
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
