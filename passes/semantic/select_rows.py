"""Picks the positions of each sequence that the loss and the backward pass run on."""

from __future__ import annotations

import operator
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.options import RANKED, Options
from cggr_compile.passes.analysis.positions import union
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import Candidates, ExtraRows, GradientRows, LossSite, NoRouter, RouterScores, Selection
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value, shape_of
from cggr_compile.passes.step_interface import StepOutputs, add_state_input

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

ops = torch.ops.cggr
UNWEIGHTED = ("topk", "fixed_quota", "sequence_aware")


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
        if options.selection in UNWEIGHTED:
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
    if options.selection in RANKED:
        # what has no rank is drawn, weighted, with the same slots
        options = replace(options, selection="random", scope="batch" if options.whole_batch else "sequence")
        told.append(f"selection={ctx.options.selection!r} has nothing to rank by and becomes 'random'")
    elif options.selection == "importance":
        told.append("selection='importance' draws every candidate with the same probability, like 'random'")
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
    valid = ctx[Candidates].valid
    router = ctx.get(RouterScores)
    scores = router.difficulty if router and options.selection not in ("random", "labels") else None
    if options.selection == "stratified":
        drawn = emit.call(ops.stratified_sample.default, scores, valid, state, slots, options.num_strata)
        return emit.item(drawn, 0), emit.item(drawn, 1)
    wanted = slots
    if options.whole_batch:
        wanted = _share_of(emit, emit.size(valid, 1), options.ratio)
        wanted = emit.integer(torch.sym_min, wanted, slots)
    if options.selection not in UNWEIGHTED:
        cap = slots if options.whole_batch else None
        probabilities = emit.call(ops.inclusion_probabilities.default, scores, valid, wanted, cap)
        return emit.call(ops.systematic_sample.default, probabilities, state), probabilities
    if not options.whole_batch:
        return emit.call(ops.hardest.default, scores, valid, slots), None
    least: int | Node = 0
    if options.selection == "sequence_aware":
        least = emit.integer(torch.sym_min, options.min_tokens_per_sequence, slots)
        wanted = emit.integer(torch.sym_max, wanted, least)
    return emit.call(ops.hardest_of_batch.default, scores, valid, wanted, slots, least), None


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
