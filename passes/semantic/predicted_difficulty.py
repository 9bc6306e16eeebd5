"""Scores every position with what is trained beside the model to predict how large its gradient is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.ops.predictor import predictor_size
from cggr_compile.passes.analysis.hoist import Hoist
from cggr_compile.passes.base import GraphContext, PassResult
from cggr_compile.passes.facts import Candidates, FinalStates, LossSite, NoRouter, Predictor, RouterScores, TokenValues
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value, shape_of
from cggr_compile.passes.patterns.token_values.region import TokenRegion
from cggr_compile.passes.semantic.align_targets import layer_of, place_of, router_output
from cggr_compile.passes.step_interface import PredictorKey, predictor_input

if TYPE_CHECKING:
    from torch.fx import GraphModule


def insert_predictor(gm: GraphModule, ctx: GraphContext, origin: str) -> PassResult:
    """Adds, after block ``router_layers``, without gradient::

        difficulty = cggr.predict(cggr_predictor_0, x_k.detach(), lm_head.detach(), target)     # [B, S]

    ``cggr_predictor_0`` is a new graph input; ``train_predictor`` makes of it what the next step is given.
    """
    loss, anchor, final = ctx[LossSite], ctx[Candidates].anchor, ctx[FinalStates]
    source, hoist = router_output(ctx), Hoist(gm.graph, anchor)
    if why := _obstacle(ctx, hoist):
        ctx.add(NoRouter(why))
        return PassResult(False, f"no predictor: {why}")
    emit = Emitter(gm.graph, ctx.fake_mode)
    weight = hoist.bring(emit, loss.weight, origin)
    features = shape_of(source)[-1] + shape_of(final.tail[-1] if final.tail else final.states)[-1]
    key = PredictorKey(ctx.forward, layer_of(ctx, source), features)
    state = predictor_input(gm.graph, ctx.fake_mode, fake_value(source).device, key, predictor_size(features))
    with emit.before(anchor, origin):
        hidden, weight = emit.method("detach", source), emit.method("detach", weight)
        if loss.transposed:
            weight = emit.method("t", weight)
        found = emit.call(torch.ops.cggr.predict.default, state, hidden, weight, ctx[Candidates].target)
    ctx.add(RouterScores(found, None, None))
    ctx.add(Predictor(key, state, hidden, weight))
    return PassResult(True, f"difficulty is predicted {place_of(ctx, source)}", {"features": features})


def _obstacle(ctx: GraphContext, hoist: Hoist) -> str:
    """Why nothing can be predicted."""
    loss = ctx[LossSite]
    if ctx.get(TokenValues) is not None and (why := _no_norms(ctx[TokenRegion], ctx[TokenValues])):
        return f"scoring='learned' learns from what each token's loss makes of its logits, and {why}"
    if obstacle := hoist.obstacle(loss.weight, loss.head, ctx[FinalStates].stream):
        return f"{obstacle}, and scoring='learned' reads the head's weight"
    return ""


def _no_norms(region: TokenRegion, values: TokenValues) -> str:
    """Why the rows' gradients are not known where the loss is one of per-token values."""
    if values.labels is None:
        return "this loss reads no label"
    if not region.logits:
        return "" if len(region.heads) == 1 else f"there are {len(region.heads)} heads"
    return "" if region.final_logits is not None else "this loss reads several logits"
