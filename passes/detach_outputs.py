"""The logits contract: no output but the loss may drag a dense gradient into the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cggr_compile.passes.base import GraphContext, PassResult, fake_value
from cggr_compile.passes.fx import Emitter, descendants

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


class DetachOutputs:
    """Replaces returned logits by an empty tensor (or detaches them) and detaches every other dense output.

    Before::

        return (loss, logits, key_cache)

    After, with ``logits="drop"``::

        return (loss, x.new_empty(B, 0, V), key_cache.detach())

    Scalars keep their gradient: they are losses. Outputs without gradient are left alone.
    """

    name = "detach_outputs"
    required = False
    analysis = False

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        assert ctx.loss is not None and ctx.stack is not None
        output = gm.graph.output_node()
        from_head = descendants([ctx.loss.head])
        emit = Emitter(gm.graph, ctx.fake_mode)
        dropped, detached = [], []
        with emit.before(output, self.name):
            for node in list(output.all_input_nodes):
                value = fake_value(node)
                if not isinstance(value, torch.Tensor) or not value.requires_grad or value.dim() == 0:
                    continue
                if ctx.options.logits == "drop" and node in from_head and value.shape[-1] == ctx.loss.vocab:
                    replacement = self._empty(emit, node, ctx)
                    dropped.append(str(node))
                else:
                    replacement = emit.method("detach", node)
                    detached.append(str(node))
                output.replace_input_with(node, replacement)
        if dropped:
            ctx.notices.append(
                "logits are not computed in a training step and come back empty, [batch, 0, vocab]; "
                "options={'logits': 'detach'} returns them without gradient"
            )
        if not dropped and not detached:
            return PassResult(False, "no output but the loss has a gradient")
        return PassResult(
            True,
            f"{len(dropped)} logits dropped, {len(detached)} outputs detached",
            {"dropped": dropped, "detached": detached},
        )

    def _empty(self, emit: Emitter, node: Node, ctx: GraphContext) -> Node:
        assert ctx.stack is not None
        value = fake_value(node)
        lead = [emit.size(ctx.stack.source, 0), 0] if value.dim() == 3 else [0]
        return emit.method("new_empty", ctx.stack.source, [*lead, ctx.loss.vocab], dtype=value.dtype)  # type: ignore[union-attr]
