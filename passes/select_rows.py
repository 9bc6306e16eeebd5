"""Picks the positions of each sequence that the loss and the backward pass run on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.base import GraphContext, PassResult, Selection
from cggr_compile.passes.fx import Emitter

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


class SelectRows:
    """Adds the selection, with a static number K of slots per sequence and no host synchronisation::

        scores = cggr.uniform(cggr_state, valid)                 # or the router's difficulty
        rows, keep = cggr.select_rows(scores, valid, 1, 4)       # [B, K]; K = ceil(S / 4)
        stats = cggr.stats(keep, valid, top1, entropy, difficulty)

    ``cggr_state`` is a new graph input (seed, step); ``where(keep, rows, -1)`` and ``stats`` become the last two
    graph outputs.
    """

    name = "select_rows"
    required = True
    analysis = False

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        assert ctx.candidates is not None
        options, candidates, router = ctx.options, ctx.candidates, ctx.router
        state = _add_state_input(gm, ctx)
        emit = Emitter(gm.graph, ctx.fake_mode)
        with emit.before(candidates.anchor, self.name):
            if options.selection == "random":
                scores = emit.call(torch.ops.cggr.uniform.default, state, candidates.valid)
            else:
                assert router is not None  # Options refuses scoring="random" here
                scores = router.difficulty
            ratio = options.ratio
            picked = emit.call(
                torch.ops.cggr.select_rows.default, scores, candidates.valid, ratio.numerator, ratio.denominator
            )
            rows, keep = emit.item(picked, 0), emit.item(picked, 1)
            measured = (router.top1, router.entropy, router.difficulty) if router else (None, None, None)
            stats = emit.call(torch.ops.cggr.stats.default, keep, candidates.valid, *measured)
            public = emit.call(torch.where, keep, rows, -1)
        output = gm.graph.output_node()
        results: Any = output.args[0]
        output.args = ((*results, public, stats),)
        ctx.selection = Selection(rows, keep, state, stats)
        return PassResult(True, f"{options.selection}, ceil({ratio} * S) slots per sequence", {"ratio": str(ratio)})


def _add_state_input(gm: GraphModule, ctx: GraphContext) -> Node:
    last = [node for node in gm.graph.nodes if node.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        state = gm.graph.placeholder("cggr_state")
    assert ctx.loss is not None
    device = ctx.loss.target.meta["example_value"].device
    with ctx.fake_mode:
        state.meta["example_value"] = torch.empty(2, dtype=torch.int64, device=device)
    state._dynamo_source = None  # AOTAutograd reads it; there is no user variable
    return state
