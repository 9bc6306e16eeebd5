"""Finds the forwards that a loss is computed from with gradient, where there are several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx import Node

from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import Forward
from cggr_compile.passes.patterns.forwards import find_forwards

if TYPE_CHECKING:
    from torch.fx import GraphModule


class FindForwards(SemanticPass):
    """Splits the context: later passes have one turn for each forward, with facts of its own; changes nothing.

    Of a preference loss, for one, whose completions are run apart::

        chosen = log_p(linear(blocks(embedding(chosen_ids)), lm_head), chosen_ids)
        rejected = log_p(linear(blocks(embedding(rejected_ids)), lm_head), rejected_ids)
        loss = -logsigmoid(0.1 * (chosen.sum(-1) - rejected.sum(-1))).mean()

    Each forward has a loss or values, layers and a selection of its own. All are rewritten, or none.
    """

    name = "find_forwards"
    provides = (Forward,)
    analysis = True
    whole_graph = True

    def enabled(self, ctx: GraphContext) -> bool:
        return True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        found = find_forwards(gm.graph)
        if len(found) < 2:
            return PassResult(False, "one forward")
        every = frozenset[Node]().union(*found)
        ctx.split([Forward(embeddings, every - embeddings) for embeddings in found])
        return PassResult(True, f"{len(found)} forwards with gradient, each with a selection of its own")
