"""Picks the positions of each sequence that the loss and the backward pass run on."""

from __future__ import annotations

import operator
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.options import Options
from cggr_compile.passes.analysis.positions import union
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import Candidates, ExtraRows, GradientRows, LossSite, NoRouter, RouterScores, Selection
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value, shape_of
from cggr_compile.passes.step_interface import StepOutputs, add_state_input
from cggr_compile.selections.record import SlotRequest

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

ops = torch.ops.cggr


class SelectRows(SemanticPass):
    """Adds the selection, with a static number K of slots per sequence and no host synchronisation::

        p = cggr.inclusion_probabilities(difficulty, valid, K, None)         # selection="importance"; K = ceil(S / 4)
        rows, keep = cggr.pack_rows(cggr.systematic_sample(p, cggr_state), K)    # [B, K]
        weights = cggr.row_weights(rows, keep, valid, p)                     # 1 / p
        stats = cggr.stats(keep, valid, top1, entropy, difficulty)

    ``cggr_state`` is a new graph input (seed, step); ``weights``, ``where(keep, rows, -1)`` and ``stats`` become the
    last three graph outputs.

    Where positions carry gradient though the loss may not select them (``ExtraRows``), G - K slots are theirs::

        extra = (arange(S) < 4).expand(B, S)                                 # a soft prompt's, say
        gradient_rows, gradient_keep, places, dropped = cggr.gradient_rows(rows, keep, extra, G)
    """

    name = "select_rows"
    needs = (LossSite, Candidates)
    uses = (RouterScores, NoRouter, ExtraRows)
    provides = (Selection,)

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        candidates, router = ctx[Candidates], ctx.get(RouterScores)
        unrouted = ctx.get(NoRouter)
        options = _without_scores(ctx, unrouted.why) if unrouted else ctx.options
        valid = candidates.valid
        device = fake_value(ctx[LossSite].target).device
        state = add_state_input(gm.graph, ctx.fake_mode, device)
        emit = Emitter(gm.graph, ctx.fake_mode)
        with emit.before(candidates.anchor, self.name):
            slots = _share_of(emit, emit.size(valid, 1), options.most_slots)
            mask, probabilities = _select(emit, ctx, options, state, slots)
            packed = emit.call(ops.pack_rows.default, mask, slots)
            rows, keep = emit.item(packed, 0), emit.item(packed, 1)
            weights = emit.call(ops.row_weights.default, rows, keep, valid, probabilities)
            measured = (router.top1, router.entropy, router.difficulty) if router else (None, None, None)
            gradient, dropped = _gradient_rows(emit, ctx, rows, keep, slots)
            stats = emit.call(ops.stats.default, keep, valid, *measured, *dropped)
            public = emit.call(torch.where, keep, rows, -1)
        StepOutputs(weights, public, stats).append_to(gm.graph)
        ctx.add(Selection(rows, keep, weights, state, stats, gradient))
        if not options.selection_record.sampled:
            ctx.notices.append(
                f"selection={options.selection!r} trains on a biased sample: selecting the hardest tokens, without "
                "weights, ended at a held-out loss of 4.95 to 6.47 where random tokens reached 3.42 and dense training "
                "2.38 (23M parameters from scratch, a quarter of the tokens, equal steps). selection='importance' "
                "is weighted"
            )
        most = options.most_slots
        number = f"ceil({most} * S)" if isinstance(most, Fraction) else f"min({most}, S)"
        unranked = ", without a router" if unrouted else ""
        details = {"slots": str(slots)}
        if gradient is not None:
            details["gradient_slots"] = str(shape_of(gradient.rows)[1])
        return PassResult(True, f"{options.selection}{unranked}, {number} slots per sequence", details)


def _without_scores(ctx: GraphContext, unrouted: str) -> Options:
    """The options, with a selection that needs no score; says so."""
    options, why = ctx.options, f"the router is left out: {unrouted}"
    told = []
    scores = options.selection_record.scores
    if scores == "needed":
        # what has no rank is drawn, weighted, with the same slots
        options = replace(options, selection="random", scope="batch" if options.whole_batch else "sequence")
        told.append(f"selection={ctx.options.selection!r} has nothing to rank by and becomes 'random'")
    elif scores == "used":
        told.append(f"selection={options.selection!r} draws every candidate with the same probability, like 'random'")
    if options.dynamic_threshold:
        told.append("dynamic_threshold does nothing")
    if told:
        remedy = "Compute it before the first block, or ask for scoring='random' and selection='random'"
        ctx.warnings.append(f"{' and '.join(told)}: {why}. {remedy}")
    return options


def _select(
    emit: Emitter, ctx: GraphContext, options: Options, state: Node, slots: int | Node
) -> tuple[Node, Node | None]:
    """The selection, bool [B, S], with at most ``slots`` per sequence, and for random ones its probabilities."""
    valid, record = ctx[Candidates].valid, options.selection_record
    router = ctx.get(RouterScores)
    scores = router.difficulty if router and record.scores != "unused" else None
    budget = slots
    if options.whole_batch:
        budget = _share_of(emit, emit.size(valid, 1), options.ratio)
        budget = emit.integer(torch.sym_min, budget, slots)
    request = SlotRequest(
        scores=emit.proxy(scores),
        valid=emit.proxy(valid),
        state=emit.proxy(state),
        slots=emit.proxy(slots),
        budget=emit.proxy(budget),
        whole_batch=options.whole_batch,
        options=options,
    )
    mask, probabilities = record.by_slots(request)
    return emit.node(mask), None if probabilities is None else emit.node(probabilities)


def _gradient_rows(
    emit: Emitter, ctx: GraphContext, rows: Node, keep: Node, slots: int | Node
) -> tuple[GradientRows | None, list[Node]]:
    """The rows that carry gradient if they are more than the selected ones, and how many found no slot."""
    more = ctx.get(ExtraRows)
    if more is None:
        return None, []
    valid = ctx[Candidates].valid
    # what the regions depend on stands in front of the first block: the embeddings are made with it
    regions, most = more.regions, more.most
    batch, length = emit.size(valid, 0), emit.size(valid, 1)
    extra = union(emit, regions, batch, length, fake_value(valid).device)
    wanted = emit.integer(torch.sym_min, emit.integer(operator.add, slots, most), length)
    found = emit.call(ops.gradient_rows.default, rows, keep, extra, wanted)
    packed, kept, places, dropped = (emit.item(found, i) for i in range(4))
    return GradientRows(packed, kept, places, extra), [dropped]


def _share_of(emit: Emitter, length: int | Node, share: Fraction | int) -> int | Node:
    """A number of positions, at most ``length``: rounded up where it is a share of it."""
    if isinstance(share, int):
        return emit.integer(torch.sym_min, share, length)
    scaled = emit.integer(operator.mul, length, share.numerator)
    return emit.integer(operator.floordiv, emit.integer(operator.add, scaled, share.denominator - 1), share.denominator)
