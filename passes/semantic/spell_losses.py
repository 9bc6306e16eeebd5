"""Brings losses that are written in other words to the ones that the passes behind know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.fx import Emitter, layout_only
from cggr_compile.passes.nodes import argument, fake_value, op_name, shape_of
from cggr_compile.passes.patterns.head import token_slice
from cggr_compile.passes.patterns.token_values.rules.losses import LossCall, read_loss

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


class SpellLosses(SemanticPass):
    """Writes a cross-entropy as one.

    Before::

        log_p = log_softmax(logits, -1)
        loss = nll_loss(log_p[:, :-1].reshape(-1, V), labels)

    After::

        loss = cross_entropy(logits[:, :-1].reshape(-1, V), labels)
    """

    name = "spell_losses"
    optional = True

    def enabled(self, ctx: GraphContext) -> bool:
        return not ctx.dense or ctx.observing

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        emit = Emitter(gm.graph, ctx.fake_mode)
        found = []
        for node in list(gm.graph.nodes):
            loss = read_loss(node)
            if loss is not None and loss.function is F.nll_loss and not loss.soft:
                chain = _to_log_softmax(loss.logits)
                if chain is not None:
                    self._rewrite(emit, node, loss, chain)
                    found.append(str(node))
        if not found:
            return PassResult(False, "no loss in other words")
        return PassResult(True, f"{len(found)} cross-entropies written as nll_loss of log_softmax", {"losses": found})

    def _rewrite(self, emit: Emitter, node: Node, loss: LossCall, chain: list[Node]) -> None:
        mapping: dict[Node, Node] = {chain[0]: chain[0].args[0] if chain[0].args else chain[0].kwargs["input"]}  # type: ignore[dict-item]
        dtype = fake_value(chain[0]).dtype
        if fake_value(mapping[chain[0]]).dtype != dtype:
            with emit.before(chain[0], self.name):
                mapping[chain[0]] = emit.method("to", mapping[chain[0]], dtype)
        for view in chain[1:]:
            with emit.before(view, self.name):
                mapping[view] = emit.copy(view, mapping)
        with emit.before(node, self.name):
            logits = mapping[chain[-1]]
            new = emit.call(F.cross_entropy, logits, loss.target, reduction=loss.reduction, **loss.others)
        node.replace_all_uses_with(new)
        emit.graph.erase_node(node)


def _to_log_softmax(node: Any) -> list[Node] | None:
    """The calls from a log-softmax over the axis that ``nll_loss`` takes for classes, in order; None for others."""
    chain = [node]
    while op_name(node) != "log_softmax":
        moves = layout_only(node) or (op_name(node) == "getitem" and token_slice(node) is not None)
        if not moves or not node.all_input_nodes or node.op == "placeholder":
            return None
        node = node.all_input_nodes[0]
        chain.append(node)
    axis = argument(node, 1, "dim")
    if not isinstance(axis, int):
        return None
    shape, end = shape_of(node), shape_of(chain[0])
    last = axis % len(shape) == len(shape) - 1 and len(end) == 2
    return chain[::-1] if last or (len(chain) == 1 and axis % len(shape) == 1) else None
