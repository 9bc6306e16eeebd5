"""Scores every position with the truncated router: the model's own first blocks, final norm and head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile import compat
from cggr_compile.passes.base import GraphContext, PassResult, RouterScores, fake_value, product_dtype
from cggr_compile.passes.candidates import router_output
from cggr_compile.passes.difficulty import STATISTICS, difficulty
from cggr_compile.passes.fx import Emitter, hoist
from cggr_compile.passes.tail import copy_tail

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


class InsertRouter:
    """Adds, after block ``router_layers``, without gradient and sharing the prefix with the main forward::

    h = x_k.detach()
    lse, entropy, top1, top2, label_logprob = cggr.score(norm(h), lm_head.detach(), None, target, 1.0, 0.0)
    difficulty = cggr.difficulty(entropy, top1, top2, label_logprob, "combined")     # [B, S]
    """

    name = "insert_router"
    required = False
    analysis = False

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        assert ctx.loss is not None and ctx.stack is not None and ctx.candidates is not None
        if not ctx.options.needs_router:
            return PassResult(False, "scoring='random' needs no router")
        stack, loss = ctx.stack, ctx.loss
        source = router_output(ctx)
        inside = {stack.blocks[-1].output, *stack.tail}
        for node in stack.tail:
            for other in node.all_input_nodes:
                if other not in inside:
                    hoist(other, ctx.candidates.anchor)  # such as Gemma's 1 + weight
        for parameter in filter(None, (loss.weight, loss.bias)):
            hoist(parameter, ctx.candidates.anchor)
        emit = Emitter(gm.graph, ctx.fake_mode)
        with emit.before(ctx.candidates.anchor, self.name):
            hidden = copy_tail(emit, stack, loss, emit.method("detach", source), in_place=False)[loss.hidden]
            weight = emit.method("detach", loss.weight)
            if loss.transposed:
                weight = emit.method("t", weight)
            bias = emit.method("detach", loss.bias) if loss.bias is not None else None
            dtype = _compute_dtype(fake_value(loss.weight), ctx.options.router_precision)
            operands = [
                node if node is None or fake_value(node).dtype == dtype else emit.method("to", node, dtype)
                for node in (emit.method("detach", hidden), weight, bias)
            ]

            target = ctx.candidates.target

            def score(factor: float) -> Node:
                """Statistics of the softmax of ``factor`` times the logits."""
                scale, softcap = factor * loss.scale, factor * loss.softcap
                fp8 = ctx.options.router_precision == "fp8"
                return emit.call(torch.ops.cggr.score.default, *operands, target, scale, softcap, fp8)

            scored = score(1.0)
            statistics = [emit.item(scored, i) for i in range(len(STATISTICS))]
            found = difficulty(emit, statistics, ctx.options.scoring, lambda: emit.item(score(2.0), 0))
        _, entropy, top1, _, _ = statistics
        ctx.router = RouterScores(found, top1, entropy)
        number = [block.output for block in stack.blocks].index(source) + 1
        return PassResult(True, f"{ctx.options.scoring_name} difficulty after block {number} of {len(stack.blocks)}")


def _compute_dtype(weight: torch.Tensor, precision: str) -> torch.dtype:
    """The dtype of what the router's head is given; ``model`` is that of the model's own, autocast's where it is on."""
    kind = weight.device.type
    if precision == "bf16" or (precision == "auto" and kind == "cpu" and compat.cpu_multiplies_bf16()):
        return torch.bfloat16
    return product_dtype(weight)
