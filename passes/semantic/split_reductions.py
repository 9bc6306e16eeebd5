"""Takes sums over the vocabulary and the positions one after the other, so that there are per-token values between."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import Forward, LossSite
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value, op_name, shape_of
from cggr_compile.passes.patterns.token_values.layout import FEATURE, Layout
from cggr_compile.passes.patterns.token_values.region import NoTokenValuesError, find_region
from cggr_compile.passes.patterns.token_values.rules.along import axes_of
from cggr_compile.passes.patterns.token_values.rules.losses import ELEMENTWISE, LossCall, read_loss

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

_HALF = (torch.float16, torch.bfloat16)


class SplitReductions(SemanticPass):
    """Splits the means and sums of losses that are no single cross-entropy.

    Before::

        a = cross_entropy(z, labels) + 1e-4 * z.logsumexp(-1).square().mean()       # z [N, V]
        b = kl_div(log_p, q, reduction="batchmean")

    After::

        each = cross_entropy(z, labels, reduction="none")                           # [N]
        a = each.sum() / (labels != -100).sum().clamp(min=1) + 1e-4 * ...
        b = kl_div(log_p, q, reduction="none").sum(-1, keepdim=True).sum() / N

    A mean of no labels, which is no number, becomes 0.
    """

    name = "split_reductions"
    uses = (Forward, LossSite)

    def enabled(self, ctx: GraphContext) -> bool:
        return not ctx.dense or ctx.observing

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        if ctx.get(LossSite) is not None:
            return PassResult(False, "the loss is one cross-entropy")
        emit, found = Emitter(gm.graph, ctx.fake_mode), list[str]()
        while True:
            try:
                region = find_region(gm.graph, ctx.get(Forward))
            except NoTokenValuesError:
                break  # find_token_values says so
            if region is None or not region.splits:
                break
            for node in region.splits:
                found.append(str(node))
                with emit.before(node, self.name):
                    loss = read_loss(node)
                    if loss is not None:
                        new = _loss(emit, node, loss)
                    else:
                        source: Any = node.args[0]
                        new = _sum(emit, node, source, region.layout(source))
                    if fake_value(new).dtype != fake_value(node).dtype:
                        new = emit.method("to", new, fake_value(node).dtype)
                node.replace_all_uses_with(new)
                gm.graph.erase_node(node)
        if not found:
            return PassResult(False, "no sum over positions and vocabulary at once")
        return PassResult(True, f"{len(found)} sums over positions and vocabulary split", {"sums": found})


def _loss(emit: Emitter, node: Node, loss: LossCall) -> Node:
    """The loss from that of each entry, or token."""
    others = {name: value for name, value in loss.others.items() if value is not None}
    operands = (loss.logits, loss.target)
    each = emit.call(loss.function, *operands, reduction="none", **others)
    wide = emit.method("float", each) if fake_value(each).dtype in _HALF else each
    if loss.reduction == "sum":
        return emit.method("sum", wide)
    if loss.reduction == "batchmean":
        return emit.call(operator.truediv, emit.method("sum", wide), shape_of(node.all_input_nodes[0])[0])
    if op_name(node) in ELEMENTWISE or loss.soft:
        return emit.method("mean", wide)
    known = emit.call(operator.ne, loss.target, loss.ignore_index)
    if loss.weight is None:
        count = emit.method("clamp", emit.method("sum", known), min=1)
    else:
        of_label = emit.call(operator.getitem, loss.weight, emit.call(torch.where, known, loss.target, 0))
        count = emit.method("sum", emit.call(torch.where, known, of_label, 0.0))
        count = emit.call(torch.where, emit.method("any", known), count, 1.0)
    return emit.call(operator.truediv, emit.method("sum", wide), count)


def _sum(emit: Emitter, node: Node, source: Node, layout: Layout) -> Node:
    """A sum or mean, over features first."""
    name = op_name(node)
    axes = axes_of(node, len(shape_of(source)))
    features = [axis for axis in axes if layout.axes[axis] == FEATURE]
    keep = bool(node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False))
    dtype = node.kwargs.get("dtype")
    kwargs: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    each = emit.method(name, source, features, True, **kwargs)
    return emit.method(name, each, axes, keep, **kwargs)
