"""Computes per-token values without logits, where they are those of ``cggr::token_log_probs``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cggr_compile.passes.analysis.effects import memory, overlap
from cggr_compile.passes.analysis.hoist import Hoist
from cggr_compile.passes.analysis.modes import has_effect
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import Forward, LossSite, LoweredValues
from cggr_compile.passes.fx import Emitter, place_behind
from cggr_compile.passes.nodes import fake_value, op_name, shape_of
from cggr_compile.passes.patterns.token_values.classes import classes_of_values
from cggr_compile.passes.patterns.token_values.known import Logits, NotKnownError, Reading, read_program
from cggr_compile.passes.patterns.token_values.layout import Layout, Window
from cggr_compile.passes.patterns.token_values.operator_calls import Box, with_calls
from cggr_compile.passes.patterns.token_values.program import Taken
from cggr_compile.passes.patterns.token_values.region import NoTokenValuesError, TokenRegion, find_region
from cggr_compile.passes.patterns.token_values.rules.head_values import is_head_of_values
from cggr_compile.passes.patterns.token_values.writer import ProgramWriter, as_before

if TYPE_CHECKING:
    from torch.fx import Graph, GraphModule, Node


class LowerValues(SemanticPass):
    """Replaces logits and what is computed from them by one call of the operator for each head.

    Before::

        z = linear(hidden, lm_head)                                                  # [B, S, V]
        log_p = log_softmax(z[:, :-1] / t, -1)                                       # [B, S - 1, V]
        chosen = log_p.gather(-1, labels[:, 1:, None]).squeeze(-1)                   # [B, S - 1]
        entropy = -(log_p.exp() * log_p).sum(-1)                                     # [B, S - 1]

    After::

        found = cggr.token_log_probs(hidden, lm_head, None, labels[...], None, None, None, 1 / t, 0.0, ...)  # [B, S]
        chosen, entropy = found[0][:, :-1], found[1][:, :-1]

    Known are the log-probability, probability and logit of a label, entropy, logsumexp, the sums over the vocabulary
    of logits, log-probabilities and squared probabilities, and ``cross_entropy`` and ``nll_loss`` of a label; of logits
    with a bias, factors that are numbers, a tanh soft-cap, casts, and a vocabulary that is cut off. Where all values
    are such of a loss's label, positions whose label is ignored cost nothing. If anything else reads the logits, or
    they leave the graph, they are computed anyway, and everything stays as it is.
    """

    name = "lower_values"
    uses = (Forward, LossSite)
    provides = (LoweredValues,)
    optional = True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        if ctx.get(LossSite) is not None:
            return PassResult(False, "the loss is one cross-entropy")
        try:
            region = find_region(gm.graph, ctx.get(Forward))
        except NoTokenValuesError:
            region = None
        if region is None or not region.values or region.splits:
            return PassResult(False, "there are no per-token values of logits")
        heads = {region.planner.found[head].ref: head for head in region.heads if not is_head_of_values(head)}
        if not heads:
            return PassResult(False, "there are no logits")
        refs = [region.planner.found[node].ref for node in region.values]
        hoist = Hoist(gm.graph, min(region.heads))
        try:
            _check_readers(region)
            written_to = _written_to(region)
            read = read_program(region.planner.program, refs, heads)
            _check_labels(read, region, hoist)
        except NotKnownError as why:
            return PassResult(False, f"the logits {why}")
        labels = classes_of_values(region)
        emit = Emitter(gm.graph, ctx.fake_mode)
        program, now, everywhere = with_calls(
            region.planner.program,
            read,
            heads,
            region.planner.order.__getitem__,
            lambda node: hoist.bring(emit, node, self.name),
            lambda logits: _box(region, read, logits),
        )
        writer = _all_positions(emit, region, self.name)
        written = writer.write(program, [now[ref] for ref in refs])
        for node, ref in zip(region.values, refs, strict=True):
            with emit.before(node.next, self.name):
                value = _placed(emit, written[now[ref]], region.layout(node), shape_of(node))
                if fake_value(value).dtype != fake_value(node).dtype:
                    value = emit.method("to", value, fake_value(node).dtype)
                elif node in written_to:  # not into the operator's output
                    value = emit.method("clone", value)
            node.replace_all_uses_with(value)
        _erase(gm.graph, region)
        layouts = tuple(region.layout(head) for head in region.heads)
        ctx.add(LoweredValues(region.heads, layouts, frozenset(written[ref] for ref in everywhere), labels))
        names = sorted({known.name for known in read.values.values()})
        return PassResult(
            True, f"no logits: {', '.join(names)} of {', '.join(map(str, heads.values()))}", {"values": names}
        )


def _check_readers(region: TokenRegion) -> None:
    """Logits have no reader but the values."""
    found = region.planner.found
    for node in region.logits:
        for user in node.users:
            if user not in found:
                what = "leave the graph" if user.op == "output" else f"are read by {op_name(user)!r} ({user}) as well"
                raise NotKnownError(what)


def _written_to(region: TokenRegion) -> set[Node]:
    """The values that the user writes to in place."""
    found = {node for node in region.values if not region.planner.unwritten(node)}
    for node in found:
        if any(other is not node and overlap(memory(node), memory(other)) for other in region.values):
            raise NotKnownError(f"have values that share memory and are written in place ({node})")
    return found


def _check_labels(read: Reading, region: TokenRegion, hoist: Hoist) -> None:
    """Labels can be had where the heads are."""
    program = region.planner.program
    for label in {known.label for known in read.values.values() if known.label is not None}:
        taken = program.steps[label.taken.number]
        assert isinstance(taken, Taken)
        if obstacle := hoist.obstacle(taken.node, program.anchors[label.taken.number]):
            raise NotKnownError(f"come before their labels: {obstacle}")


def _box(region: TokenRegion, read: Reading, logits: Logits) -> Box | None:
    """Around the positions at which values of these logits are taken."""
    planner = region.planner
    steps = {number for number, known in read.values.items() if known.logits == logits}
    readers = [v for v in region.values if not steps.isdisjoint(planner.program.needed([planner.found[v].ref]))]
    windows = [region.layout(value).window for value in readers]
    whole = region.layout(region.stem).window
    (top, bottom), (left, right) = (
        (min(begin for begin, _ in ends), max(end for _, end in ends))
        for ends in ([_sequences(w) for w in windows], [(w.start, w.start + w.length) for w in windows])
    )
    outside = left, whole.length - right, top, whole.count - bottom
    return (slice(top, bottom), slice(left, right), outside) if any(outside) else None


def _sequences(window: Window) -> tuple[int, int]:
    """The first and the one behind the last that a window has rows of."""
    begin, end = window.begin, window.begin + window.size
    return window.first + begin // window.length, window.first + -(-end // window.length)


def _all_positions(emit: Emitter, region: TokenRegion, origin: str) -> ProgramWriter:
    """Writes a program for every position of the hidden state."""
    stem = region.stem
    window = region.planner.found[stem].layout.window
    batch, length = window.count, window.length
    begin = place_behind(stem)
    with emit.before(begin, origin):
        positions = emit.call(torch.arange, length, device=fake_value(stem).device)
        positions = emit.method("expand", positions, batch, length)
        hidden = stem if len(shape_of(stem)) == 3 else emit.method("reshape", stem, batch, length, shape_of(stem)[-1])
    return ProgramWriter(emit, begin, hidden, positions, 0, origin)


def _placed(emit: Emitter, value: Node, layout: Layout, shape: tuple[int, ...]) -> Node:
    """A value [B, S, features] at the positions and in the layout of what it replaces."""
    window, sizes = layout.window, shape_of(value)
    for axis, (begin, size) in enumerate(((window.first, window.count), (window.start, window.length))):
        if size != sizes[axis]:
            value = emit.method("narrow", value, axis, begin, size)
    if not window.full:
        value = emit.method("reshape", value, [window.count * window.length, *layout.features])
        value = emit.method("narrow", value, 0, window.begin, window.size)
    return as_before(emit, value, layout, shape)


def _erase(graph: Graph, region: TokenRegion) -> None:
    """Removes what nobody reads any more."""
    for node in sorted(region.planner.found, reverse=True):
        if not node.users and node is not region.stem and not has_effect(node):
            graph.erase_node(node)
