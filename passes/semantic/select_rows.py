"""Picks the positions of each sequence that the loss and the backward pass run on."""

from __future__ import annotations

import operator
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.options import Options
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import (
    Candidates,
    ExtraRows,
    FinalStates,
    Forward,
    LayerStack,
    LossSite,
    NoRouter,
    Padding,
    RouterScores,
    Routing,
    Selection,
    Slots,
)
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value
from cggr_compile.passes.semantic.context_rows import more_rows, share_of
from cggr_compile.passes.step_interface import state_input
from cggr_compile.selections.record import SlotRequest

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

ops = torch.ops.cggr
# Added to seed and step: no run of the user's comes to these two.
_OTHER_FORWARD = 0x2545F491


class SelectRows(SemanticPass):
    """Adds the selection, with a static number K of slots per sequence and no host synchronisation::

        p = cggr.inclusion_probabilities(difficulty, valid, K, None)         # selection="importance"; K = ceil(S / 4)
        rows, keep = cggr.pack_rows(cggr.systematic_sample(p, cggr_state), K)    # [B, K]
        weights = cggr.row_weights(rows, keep, valid, p)                     # 1 / p
        stats = cggr.stats(keep, valid, top1, entropy, difficulty)

    ``cggr_state`` is a new graph input (seed, step). Each of several forwards draws by a seed of its own.

    Where positions carry gradient though the loss does not select them, context in front of those that it selects
    (the option ``context``) or what is trained there (``ExtraRows``), there are G slots for all of them::

        starts = position_ids[:, 1:] - position_ids[:, :-1] != 1             # of documents, padded to [B, S]
        distance = cggr.context_distance(mask, starts, attention_mask != 0, 128)
        extra = (arange(S) < 4).expand(B, S)                                 # a soft prompt's, say
        gradient_rows, gradient_keep, places, counts = cggr.gradient_rows(rows, keep, extra, distance, G, S)
    """

    name = "select_rows"
    needs = (Candidates, Routing)
    uses = (Forward, LossSite, RouterScores, NoRouter, ExtraRows, LayerStack, FinalStates, Padding, Slots)
    provides = (Selection,)

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        candidates, router = ctx[Candidates], ctx.get(RouterScores)
        unrouted = ctx.get(NoRouter)
        options = _without_scores(ctx, unrouted.why) if unrouted else ctx.options
        valid = candidates.valid
        device = fake_value(valid).device
        state = state_input(gm.graph, ctx.fake_mode, device)
        at_most = ctx.get(Slots) or Slots(options.most_slots, options.most_gradient_slots)
        emit = Emitter(gm.graph, ctx.fake_mode)
        with emit.before(candidates.anchor, self.name):
            if ctx.forward:
                state = emit.call(operator.add, state, ctx.forward * _OTHER_FORWARD)
            slots = share_of(emit, emit.size(valid, 1), at_most.loss)
            mask, probabilities = _select(emit, ctx, options, state, slots)
            packed = emit.call(ops.pack_rows.default, mask, slots)
            rows, keep = emit.item(packed, 0), emit.item(packed, 1)
            weights = emit.call(ops.row_weights.default, rows, keep, valid, probabilities)
            measured = (router.top1, router.entropy, router.difficulty) if router else (None, None, None)
            more = more_rows(emit, ctx, (mask, rows, keep), slots, at_most)
            stats = emit.call(ops.stats.default, keep, valid, *measured, *more.counts)
            public = emit.call(torch.where, keep, rows, -1)
        ctx.add(Selection(rows, keep, weights, public, state, stats, more.rows))
        if not options.selection_record.sampled:
            ctx.notices.append(
                f"selection={options.selection!r} trains on a biased sample: selecting the hardest tokens, without "
                "weights, ended at a held-out loss of 4.95 to 6.47 where random tokens reached 3.42 and dense training "
                "2.38 (23M parameters from scratch, a quarter of the tokens, equal steps). selection='importance' "
                "is weighted"
            )
        most = at_most.loss
        number = f"ceil({most} * S)" if isinstance(most, Fraction) else f"min({most}, S)"
        unranked = ", without a router" if unrouted else ""
        details = {"slots": str(slots)} | more.details
        return PassResult(True, f"{options.selection}{unranked}, {number} slots per sequence{more.text}", details)


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
        told.append(f"selection={options.selection!r} draws every candidate with the same probability")
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
        budget = share_of(emit, emit.size(valid, 1), options.ratio)
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
