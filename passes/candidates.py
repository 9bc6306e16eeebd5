"""Lines the loss's targets up with sequence positions and marks the positions that may be selected."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cggr_compile import compat
from cggr_compile.causes import Cause
from cggr_compile.options import OptionError
from cggr_compile.passes.base import Candidates, GraphContext, PassResult, fake_value, refused, shape_of
from cggr_compile.passes.fx import Emitter, ancestors, hoist, mutated_operand, op_name

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


class AlignTargets:
    """Moves the target in front of the router and brings it to one entry per position.

    Before, with logits for positions 0..S-2 only::

        loss = cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))

    After (the loss itself is rewritten later)::

        target = pad(labels[:, 1:].reshape(-1).reshape(B, -1), (0, 1), value=-100)   # [B, S]
        valid = (target != -100) & (attention_mask != 0)
    """

    name = "align_targets"
    required = True
    analysis = False

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        assert ctx.loss is not None and ctx.stack is not None
        stack, loss = ctx.stack, ctx.loss
        after = router_output(ctx)
        anchor = after.next
        obstacle = _written_late(gm, ctx, anchor)
        if obstacle is not None:
            return refused(Cause.LATE_LABELS, what=f"{op_name(obstacle)!r} ({obstacle})")
        hoist(loss.target, anchor)
        start = stack.tail_start + loss.start
        rest = _positions_after(ctx, start)
        if rest is None:
            return refused(Cause.UNALIGNED_TARGETS)
        emit = Emitter(gm.graph, ctx.fake_mode)
        with emit.before(anchor, self.name):
            length = emit.minus(emit.size(after, 1), start + rest)
            target = emit.method("reshape", loss.target, emit.size(after, 0), length)
            if start or rest:
                target = emit.call(torch.nn.functional.pad, target, (start, rest), "constant", loss.ignore_index)
            valid = emit.call(torch.ne, target, loss.ignore_index)
            if ctx.padding is not None:
                valid = emit.call(torch.logical_and, valid, emit.call(torch.ne, ctx.padding, 0))
        ctx.candidates = Candidates(target, valid, anchor)
        padding = f" that are not padding ({ctx.padding})" if ctx.padding is not None else ""
        return PassResult(True, f"candidates: positions whose target is not {loss.ignore_index}{padding}")


def _positions_after(ctx: GraphContext, start: int) -> int | None:
    """How many positions at the end of the sequence have no logit row, or None if that is no fixed number."""
    assert ctx.loss is not None and ctx.stack is not None
    rows = full = shape_of(ctx.stack.blocks[-1].output)
    for node in (*ctx.stack.tail, *ctx.loss.chain):
        if op_name(node) in ("transpose", "swapaxes", "permute", "mT"):
            break
        if len(shape_of(node)) == 3:
            rows = shape_of(node)
    missing = full[1] - rows[1] - start
    if isinstance(missing, int):
        return missing if missing >= 0 else None
    expression = missing.node.expr
    return int(expression) if expression.is_Integer and expression >= 0 else None


def _written_late(gm: GraphModule, ctx: GraphContext, anchor: Node) -> Node | None:
    """An in-place write, from ``anchor`` on, to a tensor that the target is computed from."""
    assert ctx.loss is not None
    memory = {
        compat.storage_id(v) for n in ancestors([ctx.loss.target]) if isinstance(v := fake_value(n), torch.Tensor)
    }
    nodes: list[Node] = list(gm.graph.nodes)
    for node in nodes[nodes.index(anchor) :]:
        operand = mutated_operand(node)
        if operand is not None and compat.storage_id(fake_value(operand)) in memory:
            return node
    return None


def router_output(ctx: GraphContext) -> Node:
    """The residual stream after the block that the router reads (default: about an eighth of the stack)."""
    assert ctx.stack is not None
    blocks, wanted = ctx.stack.blocks, ctx.options.router_layers
    if wanted == "full":
        return blocks[-1].output
    count = max(1, round(len(blocks) / 8)) if wanted is None else int(wanted)
    if count > len(blocks):
        raise OptionError(f"router_layers must be at most {len(blocks)}, the model's number of blocks, got {count}")
    return blocks[count - 1].output
