"""Returns what the runtime keeps of a step: weights, positions, figures."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import Figures, FittedPredictor, ObservedRouter, RowGradients, Selection
from cggr_compile.passes.fx import Emitter, place_behind
from cggr_compile.passes.step_interface import StepOutputs

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


class ReturnFigures(SemanticPass):
    """Lets the graph return, behind the user's results, for each of its forwards the weights and the positions::

        where(keep, rows, -1)

    and the figures of all of them together::

        stats = cggr.join_stats([stats_1, stats_2])

    Where the schedule goes by the gradients of the rows, sums of them, of all forwards too::

        moments = cggr.gradient_moments(g, weights)

    What the passes in front have computed; where every position is trained on, the figures of the router, if any. And
    what the predictors have become.
    """

    name = "return_figures"
    uses = (Selection, ObservedRouter, FittedPredictor, RowGradients)
    provides = (Figures,)
    whole_graph = True

    def enabled(self, ctx: GraphContext) -> bool:
        return not ctx.dense or ctx.observing

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        selections = ctx.every(Selection)
        every = [found.stats for found in selections] + [found.stats for found in ctx.every(ObservedRouter)]
        if not every:
            return PassResult(False, "there are no figures")
        stats = every[0]
        if len(every) > 1:
            emit = Emitter(gm.graph, ctx.fake_mode)
            with emit.before(max(every).next, self.name):
                stats = emit.call(torch.ops.cggr.join_stats.default, every)
        weights, public = (tuple(getattr(found, name) for found in selections) for name in ("weights", "public"))
        predictors = {found.key: found.state for found in ctx.every(FittedPredictor)}
        returned = StepOutputs(weights, public, stats, self._moments(gm, ctx), predictors)
        returned.append_to(gm.graph)
        ctx.add(Figures(returned.form))
        kept = f"weights and positions of {len(selections)} selections" if len(selections) > 1 else "the selection"
        return PassResult(True, f"{kept} and figures are returned" if selections else "figures are returned")

    def _moments(self, gm: GraphModule, ctx: GraphContext) -> Node | None:
        """Sums of the gradients of all rows that carry loss; None where nobody reads them, or not all are known."""
        if not ctx.measured:
            return None
        emit, found = Emitter(gm.graph, ctx.fake_mode), []
        for forward in ctx.forwards:
            with ctx.of(forward):
                selection, gradients = ctx.get(Selection), ctx.get(RowGradients)
            if selection is None:
                continue
            if gradients is None:
                return None
            with emit.before(place_behind(gradients.norms), self.name):
                moments = emit.call(torch.ops.cggr.gradient_moments.default, gradients.norms, selection.weights)
            found.append(moments)
        if not found:
            return None
        total = found[0]
        for moments in found[1:]:
            with emit.before(place_behind(max(total, moments)), self.name):
                total = emit.call(operator.add, total, moments)
        return total
