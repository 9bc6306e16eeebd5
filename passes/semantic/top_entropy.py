"""Leaves only those candidates whose final entropy is among the highest of the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.analysis.hoist import Hoist
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import Candidates, FinalStates, TokenValues
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.semantic.final_entropy import ENTROPY, final_entropy
from cggr_compile.passes.semantic.value_candidates import ValueCandidates

if TYPE_CHECKING:
    from torch.fx import GraphModule


class TopEntropy(SemanticPass):
    """Narrows the candidates to a share of them (the option ``top_entropy_quantile``).

    Before::

        log_prob, entropy, ... = cggr.token_log_probs(hidden[:, :-1], lm_head, None, labels, ...)       # [B, S - 1]
        valid = pad(labels != -100, (0, 1), value=False)                                                # [B, S]

    After::

        valid = cggr.top_quantile(pad(entropy.detach(), (0, 1), value=0.0), valid, 0.2)

    The forward pass is done by then and depends on nothing of it: the rows are those of the gradient.
    """

    name = "top_entropy"
    needs = (FinalStates, Candidates)
    uses = (TokenValues,)
    provides = (Candidates,)

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        share, candidates = ctx.options.top_entropy_quantile, ctx[Candidates]
        if share == 1.0:
            return PassResult(False, "top_entropy_quantile=1.0 leaves every candidate")
        found = final_entropy(gm.graph, ctx)
        if isinstance(found, str):
            ctx.warnings.append(f"top_entropy_quantile={share} does nothing: {found}")
            return PassResult(False, found)
        emit = Emitter(gm.graph, ctx.fake_mode)
        place = ValueCandidates(emit, ctx, Hoist(gm.graph, candidates.anchor), self.name)
        with emit.before(candidates.anchor, self.name):
            entropy = emit.method("detach", emit.item(found.call, ENTROPY))
            entropy = place.whole(entropy, found.layout, 0.0)
            valid = emit.call(torch.ops.cggr.top_quantile.default, entropy, candidates.valid, float(share))
        ctx.add(replace(candidates, valid=valid))
        return PassResult(True, f"candidates: of those, the {share:.0%} of the highest entropy")
