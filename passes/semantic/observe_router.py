"""Reads the router's figures off a graph that trains on every position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.base import GraphContext, PassResult
from cggr_compile.passes.fx import Emitter

if TYPE_CHECKING:
    from torch.fx import GraphModule


class ObserveRouter:
    """Adds, at ratio 1.0 under ``dynamic_threshold``, the figures that the next steps' ratio depends on::

        stats = cggr.stats(valid, valid, top1, entropy, difficulty)

    as the last graph output. Loss and gradients stay the user's.
    """

    name = "observe_router"
    required = False
    analysis = False

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        candidates, router = ctx.candidates, ctx.router
        assert candidates is not None
        if router is None:
            return PassResult(False, f"the schedule gets no figures: no router: {ctx.unrouted}")
        emit = Emitter(gm.graph, ctx.fake_mode)
        with emit.before(candidates.anchor, self.name):
            measured = (router.top1, router.entropy, router.difficulty)
            stats = emit.call(torch.ops.cggr.stats.default, candidates.valid, candidates.valid, *measured)
        output = gm.graph.output_node()
        results: Any = output.args[0]
        output.args = ((*results, stats),)
        ctx.observed = stats
        return PassResult(True, "the router's figures are returned beside the unmodified loss")
