"""The logits contract: what is returned beside the loss may drag no dense gradient into the backward pass unasked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import FinalStates, LayerStack, LossSite, Outputs
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


class DetachOutputs(SemanticPass):
    """Replaces returned logits by an empty tensor (or detaches them) and detaches the keys and values of a cache.

    Before::

        return (loss, logits, key_cache, value_cache, hidden)

    After, with ``logits="drop"``::

        return (loss, x.new_empty(B, 0, V), key_cache.detach(), value_cache.detach(), hidden)

    Everything else is left alone: it keeps its gradient (``classify_outputs``).
    """

    name = "detach_outputs"
    needs = (LossSite, FinalStates, Outputs)
    uses = (LayerStack,)

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        output = gm.graph.output_node()
        results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
        emit = Emitter(gm.graph, ctx.fake_mode)
        dropped: list[str] = []
        detached: list[str] = []
        replaced: dict[Node, Node] = {}
        with emit.before(output, self.name):
            for position, kind in ctx[Outputs].kinds.items():
                if kind not in ("logits", "cache"):
                    continue
                node = results[position]
                whole = kind == "logits" and fake_value(node).shape[-1] == ctx[LossSite].vocab
                drop = whole and ctx.options.logits == "drop"
                if node not in replaced:
                    replaced[node] = self._empty(emit, node, ctx) if drop else emit.method("detach", node)
                    (dropped if drop else detached).append(str(node))
                results[position] = replaced[node]
        output.args = (tuple(results),)
        if dropped:
            ctx.notices.append(
                "logits are not computed in a training step and come back empty, [batch, 0, vocab]; "
                "options={'logits': 'detach'} returns them without gradient"
            )
        if not dropped and not detached:
            return PassResult(False, "no logits, keys or values are returned with a gradient")
        return PassResult(
            True,
            f"{len(dropped)} logits dropped, {len(detached)} outputs detached",
            {"dropped": dropped, "detached": detached},
        )

    def _empty(self, emit: Emitter, node: Node, ctx: GraphContext) -> Node:
        value = fake_value(node)
        stack = ctx.get(LayerStack)
        # not the last block's output, of which rows may be all that is computed
        like = ctx[FinalStates].states if stack is None else stack.source
        lead = [emit.size(like, 0), 0] if value.dim() == 3 else [0]
        return emit.method("new_empty", like, [*lead, ctx[LossSite].vocab], dtype=value.dtype)
