"""Reads the router's figures off a graph that trains on every position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import Candidates, NoRouter, ObservedRouter, RouterScores
from cggr_compile.passes.fx import Emitter

if TYPE_CHECKING:
    from torch.fx import GraphModule


class ObserveRouter(SemanticPass):
    """Adds, at ratio 1.0 under ``dynamic_threshold``, the figures that the next steps' ratio depends on::

        stats = cggr.stats(valid, valid, top1, entropy, difficulty)

    Loss and gradients stay the user's.
    """

    name = "observe_router"
    needs = (Candidates,)
    uses = (RouterScores, NoRouter)
    provides = (ObservedRouter,)

    def enabled(self, ctx: GraphContext) -> bool:
        return ctx.dense and ctx.observing

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        candidates, router = ctx[Candidates], ctx.get(RouterScores)
        if router is None:
            return PassResult(False, f"the schedule gets no figures: no router: {ctx[NoRouter].why}")
        emit = Emitter(gm.graph, ctx.fake_mode)
        with emit.before(candidates.anchor, self.name):
            measured = (router.top1, router.entropy, router.difficulty)
            stats = emit.call(torch.ops.cggr.stats.default, candidates.valid, candidates.valid, *measured)
        ctx.add(ObservedRouter(stats))
        return PassResult(True, "the router's figures are computed beside the unmodified loss")
