"""Trains what predicts the difficulties, in every step, on the rows that carry loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import Candidates, FittedPredictor, Predictor, RowGradients, Selection
from cggr_compile.passes.fx import Emitter, place_behind

if TYPE_CHECKING:
    from torch.fx import GraphModule


class TrainPredictor(SemanticPass):
    """Adds, behind the loss, a step of the predictor on the gradients that the loss rows turned out to have::

        own = x_k.detach().gather(1, rows[:, :, None].expand(-1, -1, H))                 # [B, K, H]
        t = target.gather(1, rows)                                                       # [B, K]
        fitted = cggr.fit(cggr_predictor_0, own, lm_head.detach(), t, g, weights)

    The rows are taken where they are selected, so that the hidden states of all positions need not stay until then.
    The graph returns ``fitted``, and the next step is given it.
    """

    name = "train_predictor"
    needs = (Candidates, Selection)
    uses = (Predictor, RowGradients)
    provides = (FittedPredictor,)

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        predictor, gradients = ctx.get(Predictor), ctx.get(RowGradients)
        if predictor is None or gradients is None:
            return PassResult(False, "nothing predicts the difficulties")
        selection = ctx[Selection]
        emit = Emitter(gm.graph, ctx.fake_mode)
        with emit.before(place_behind(selection.weights), self.name):
            index = emit.method("unsqueeze", selection.rows, 2)
            index = emit.method("expand", index, -1, -1, emit.size(predictor.hidden, 2))
            hidden = emit.call(torch.gather, predictor.hidden, 1, index)
            labels = emit.call(torch.gather, ctx[Candidates].target, 1, selection.rows)
        with emit.before(place_behind(gradients.norms), self.name):
            operands = hidden, predictor.weight, labels, gradients.norms, selection.weights
            fitted = emit.call(torch.ops.cggr.fit.default, predictor.state, *operands)
        ctx.add(FittedPredictor(predictor.key, fitted))
        return PassResult(True, "the predictor learns from the rows that carry loss")
