"""Lines the loss's targets up with sequence positions and marks the positions that may be selected."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cggr_compile.causes import Cause
from cggr_compile.options import OptionError
from cggr_compile.passes.analysis.hoist import Hoist
from cggr_compile.passes.analysis.modes import modes_of
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass, refused
from cggr_compile.passes.facts import Candidates, FinalStates, LayerStack, LossSite, TokenValues
from cggr_compile.passes.fx import Emitter, place_behind
from cggr_compile.passes.nodes import fake_value, op_name, shape_of
from cggr_compile.passes.semantic.final_entropy import final_entropy
from cggr_compile.passes.semantic.value_candidates import ValueCandidates, streams

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


class AlignTargets(SemanticPass):
    """Brings the target in front of the router and brings it to one entry per position.

    Before, with logits for positions 0..S-2 only::

        loss = cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))

    After (the loss itself is rewritten later)::

        target = pad(labels[:, 1:].reshape(-1).reshape(B, -1), (0, 1), value=-100)   # [B, S]
        valid = target != -100

    Of per-token values the candidates are the positions where a mask, or a target, lets a gradient through::

        valid = pad(mask[:, 1:] != 0, (0, 1), value=False)
        target = where(valid, pad(labels[:, 1:], (0, 1), value=-100), -100)
    """

    name = "align_targets"
    needs = (LossSite, FinalStates)
    uses = (LayerStack, TokenValues)
    provides = (Candidates,)

    def enabled(self, ctx: GraphContext) -> bool:
        return not ctx.dense or ctx.observing

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        final, loss = ctx[FinalStates], ctx[LossSite]
        if not fake_value(loss.loss).requires_grad:
            what = "a cross-entropy without gradient: it, or all below it, runs under no_grad"
            return refused(Cause.UNSUPPORTED_LOSS, what=what)
        after = router_output(ctx)
        anchor = _anchor(gm, ctx, after)
        if anchor is None:
            what = "inference mode or torch.vmap encloses everything behind the router's block"
            return refused(Cause.UNSUPPORTED_STACK, what=what)
        hoist = Hoist(gm.graph, anchor)
        if ctx.get(TokenValues) is not None:
            found = ValueCandidates(Emitter(gm.graph, ctx.fake_mode), ctx, hoist, self.name)
            ctx.add(found.candidates())
            late = f"; not known yet: {'; '.join(dict.fromkeys(found.unknown))}" if found.unknown else ""
            return PassResult(True, f"candidates: positions whose values may have a gradient{late}")
        assert loss.target is not None
        if obstacle := hoist.obstacle(loss.target, loss.loss, streams(ctx)):
            return refused(Cause.LATE_LABELS, what=obstacle)
        start = final.tail_start + loss.start
        rest = _positions_after(ctx, start)
        if rest is None:
            return refused(Cause.UNALIGNED_TARGETS)
        emit = Emitter(gm.graph, ctx.fake_mode)
        target = hoist.bring(emit, loss.target, self.name)
        with emit.before(anchor, self.name):
            length = emit.minus(emit.size(after, 1), start + rest)
            target = emit.method("reshape", target, emit.size(after, 0), length)
            if start or rest:
                target = emit.call(torch.nn.functional.pad, target, (start, rest), "constant", loss.ignore_index)
            valid = emit.call(torch.ne, target, loss.ignore_index)
        ctx.add(Candidates(target, valid, anchor))
        return PassResult(True, f"candidates: positions whose target is not {loss.ignore_index}")


def _positions_after(ctx: GraphContext, start: int) -> int | None:
    """How many positions at the end of the sequence have no logit row, or None if that is no fixed number."""
    rows = full = shape_of(ctx[FinalStates].states)
    for node in (*ctx[FinalStates].tail, *ctx[LossSite].chain):
        if op_name(node) in ("transpose", "swapaxes", "permute", "mT"):
            break
        if len(shape_of(node)) == 3:
            rows = shape_of(node)
    missing = full[1] - rows[1] - start
    if isinstance(missing, int):
        return missing if missing >= 0 else None
    expression = missing.node.expr
    return int(expression) if expression.is_Integer and expression >= 0 else None


def _anchor(gm: GraphModule, ctx: GraphContext, after: Node) -> Node | None:
    """The node in front of which router and selection go: as early as possible, in the modes that the graph begins in.

    Where rows are selected by the final entropy, that is behind the head.

    In inference mode, or a function under ``torch.vmap``, they cannot be: what is computed there cannot be saved for
    the backward pass. Without a place in the right grad mode, any other will do: neither has a gradient of its own.
    """
    late = final_entropy(gm.graph, ctx) if ctx.options.top_entropy_quantile < 1.0 else ""
    if not isinstance(late, str):
        return late.call.next
    modes = modes_of(gm.graph)
    nodes: list[Node] = list(gm.graph.nodes)
    gather = ctx[LossSite].head if ctx.get(TokenValues) is None else place_behind(ctx[LossSite].hidden)
    gather = ctx[FinalStates].tail[0] if ctx[FinalStates].tail else gather
    places = nodes[nodes.index(after) + 1 : nodes.index(gather) + 1]
    places = [
        node for node in places if node.op != "placeholder" and not modes[node].inference and not modes[node].levels
    ]
    recording = (node for node in places if modes[node].grad == modes[nodes[0]].grad)
    return next(recording, next(iter(places), None))


def router_output(ctx: GraphContext) -> Node:
    """The residual stream after the block that the router reads (default: about an eighth of the stack).

    Without blocks there are the final states, whatever the option says.
    """
    stack, wanted = ctx.get(LayerStack), ctx.options.router_layers
    if stack is None or wanted == "full":
        return ctx[FinalStates].states
    blocks = stack.blocks
    count = max(1, round(len(blocks) / 8)) if wanted is None else int(wanted)
    if count > len(blocks):
        raise OptionError(f"router_layers must be at most {len(blocks)}, the model's number of blocks, got {count}")
    return blocks[count - 1].output


def place_of(ctx: GraphContext, source: Node) -> str:
    """Where the router reads the hidden states, in words."""
    stack = ctx.get(LayerStack)
    return f"after block {layer_of(ctx, source)} of {len(stack.blocks)}" if stack else "of the final states"


def layer_of(ctx: GraphContext, source: Node) -> int:
    """How many blocks the router reads; 0 where there are none."""
    stack = ctx.get(LayerStack)
    return [block.output for block in stack.blocks].index(source) + 1 if stack else 0
