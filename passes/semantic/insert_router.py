"""Scores every position with the truncated router: the model's own first blocks, final norm and head."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile import compat
from cggr_compile.passes.analysis.hoist import Hoist
from cggr_compile.passes.analysis.modes import Modes
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import (
    Candidates,
    FinalStates,
    LayerStack,
    LossSite,
    NoRouter,
    Predictor,
    RouterScores,
    TokenValues,
)
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value
from cggr_compile.passes.patterns.tail import copy_tail
from cggr_compile.passes.patterns.token_values.region import TokenRegion
from cggr_compile.passes.semantic.align_targets import place_of, router_output
from cggr_compile.passes.semantic.difficulty import difficulty
from cggr_compile.passes.semantic.predicted_difficulty import insert_predictor
from cggr_compile.scorings.record import STATISTICS

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


class InsertRouter(SemanticPass):
    """Adds a router behind block ``router_layers``, without gradient, on the prefix of the main forward::

    h = x_k.detach()
    lse, entropy, top1, top2, label_logprob = cggr.score(norm(h), lm_head.detach(), None, target, 1.0, 0.0)
    difficulty = cggr.difficulty(entropy, top1, top2, label_logprob, "combined")     # [B, S]

    ``scoring="learned"`` runs no head: see :mod:`cggr_compile.passes.semantic.predicted_difficulty`.
    """

    name = "insert_router"
    needs = (LossSite, FinalStates, Candidates)
    uses = (LayerStack, TokenValues, TokenRegion)
    provides = (RouterScores, NoRouter, Predictor)
    optional = True

    def enabled(self, ctx: GraphContext) -> bool:
        return not ctx.dense or ctx.observing

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        if not ctx.options.needs_router:
            return PassResult(False, f"scoring={ctx.options.scoring_name!r} needs no router")
        if ctx.options.predicts:
            return insert_predictor(gm, ctx, self.name)
        final, loss, anchor = ctx[FinalStates], ctx[LossSite], ctx[Candidates].anchor
        source = router_output(ctx)
        hoist = Hoist(gm.graph, anchor)
        if obstacle := _obstacle(ctx, hoist):
            why = f"{obstacle}, between the block that the router reads and the head"
            ctx.add(NoRouter(why))
            return PassResult(False, f"no router: {why}")
        emit = Emitter(gm.graph, ctx.fake_mode)
        there = {node: hoist.bring(emit, node, self.name) for node, _ in _needed(ctx)}
        with emit.before(anchor, self.name), emit.under(_without_gradient(emit.modes, hoist.modes[source])):
            hidden = copy_tail(emit, final, emit.method("detach", source), in_place=False, replaced=there)
            weight = emit.method("detach", there[loss.weight])
            if loss.transposed:
                weight = emit.method("t", weight)
            bias = emit.method("detach", there[loss.bias]) if loss.bias is not None else None
            dtype = _compute_dtype(fake_value(loss.weight), ctx.options.router_precision, hoist.modes[loss.head])
            operands = [
                node if node is None or fake_value(node).dtype == dtype else emit.method("to", node, dtype)
                for node in (emit.method("detach", hidden[loss.hidden]), weight, bias)
            ]

            target = ctx[Candidates].target

            def score(factor: float) -> Node:
                """Statistics of the softmax of ``factor`` times the logits."""
                scale, softcap = factor * loss.scale, factor * loss.softcap
                fp8 = ctx.options.router_precision == "fp8"
                return emit.call(torch.ops.cggr.score.default, *operands, target, scale, softcap, fp8)

            scored = score(1.0)
            statistics = [emit.item(scored, i) for i in range(len(STATISTICS))]
            found = difficulty(emit, statistics, ctx.options.scoring, lambda: emit.item(score(2.0), 0))
        _, entropy, top1, _, _ = statistics
        ctx.add(RouterScores(found, top1, entropy))
        return PassResult(True, f"{ctx.options.scoring_name} difficulty {place_of(ctx, source)}")


def _needed(ctx: GraphContext) -> list[tuple[Node, Node]]:
    """What the router needs besides the hidden states, such as Gemma's ``1 + weight``, and what reads it last."""
    final, loss = ctx[FinalStates], ctx[LossSite]
    inside = {final.states, *final.tail}
    found = {other: node for node in final.tail for other in node.all_input_nodes if other not in inside}
    found |= {node: loss.head for node in (loss.weight, loss.bias) if node is not None}
    return list(found.items())


def _obstacle(ctx: GraphContext, hoist: Hoist) -> str:
    """Why the router cannot be inserted."""
    here = hoist.modes[hoist.anchor]
    for node in ctx[FinalStates].tail:
        if (hoist.modes[node].unknown, hoist.modes[node].levels) != (here.unknown, here.levels):
            return f"the final norm runs behind {hoist.modes[node].unknown}, whose effect on it is unknown"
    found = (hoist.obstacle(node, reader, ctx[FinalStates].stream) for node, reader in _needed(ctx))
    return next(filter(None, found), "")


def _without_gradient(modes: Modes, source: Modes) -> Modes:
    """No gradient is recorded of what comes out of inference mode: it cannot be saved for the backward pass."""
    return replace(modes, grad=modes.grad and not source.inference)


def _compute_dtype(weight: torch.Tensor, precision: str, modes: Modes) -> torch.dtype:
    """The dtype of what the router's head is given; ``model`` is that of the model's own, autocast's where it is on."""
    kind = weight.device.type
    if precision == "bf16" or (precision == "auto" and kind == "cpu" and compat.cpu_multiplies_bf16()):
        return torch.bfloat16
    return modes.product_dtype(weight)
