"""Finds the language-model loss: head -> (cast, scale, soft-cap, shift, reshape) -> cross-entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cggr_compile.causes import Cause
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import Forward, LossSite, NoSingleLoss
from cggr_compile.passes.fx import descendants, in_order
from cggr_compile.passes.nodes import differentiable, op_name
from cggr_compile.passes.patterns.head import returned_logits
from cggr_compile.passes.patterns.loss import NotALanguageModelLossError, is_cross_entropy, read_loss_site

if TYPE_CHECKING:
    from torch.fx import GraphModule


class FindLoss(SemanticPass):
    """Records head, target and cross-entropy in ``ctx[LossSite]``, where there is one loss; changes nothing.

    Finds, in any of the spellings of transformers and plain PyTorch::

        logits = linear(hidden, lm_head)              # head
        logits = tanh(logits / 30.0) * 30.0           # soft-cap, optional
        loss = cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))

    The target is taken as the loss computes it, so whatever shift the user applies is the one that is scored. Of any
    other loss ``ctx[NoSingleLoss]`` says why it is none of these, and ``find_token_values`` has its turn.
    """

    name = "find_loss"
    uses = (Forward,)
    provides = (LossSite, NoSingleLoss)
    analysis = True

    def enabled(self, ctx: GraphContext) -> bool:
        return True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        forward = ctx.get(Forward)
        inside = gm.graph.nodes if forward is None else in_order(gm.graph, descendants(forward.embeddings))
        losses = [node for node in inside if is_cross_entropy(node)]
        try:
            if not losses:
                raise NotALanguageModelLossError("", Cause.NO_LOSS)
            if len(losses) > 1:
                raise NotALanguageModelLossError(f"{len(losses)} cross-entropies in one graph")
            site = read_loss_site(losses[0])
            _check_other_uses(gm, site)
        except NotALanguageModelLossError as why:
            ctx.add(NoSingleLoss(why.refusal))
            return PassResult(False, why.refusal.reason)
        ctx.add(site)
        details = {
            "head": str(site.head),
            "vocab": str(site.vocab),
            "reduction": site.reduction,
            "label_smoothing": site.label_smoothing,
            "softcap": site.softcap,
            "scale": site.scale,
        }
        return PassResult(True, f"{site.reduction} cross-entropy over head {site.head}", details)


def _check_other_uses(gm: GraphModule, site: LossSite) -> None:
    """The logits may leave the graph, but nothing else that is differentiated may be computed from them.

    A z-loss in the loss, or log-probabilities that are returned: it would need the logits of every position, and their
    gradient.
    """
    logits = returned_logits(site)
    for first in {user: None for node in logits for user in node.users if user not in logits}:
        if first is site.loss or first.op == "output":
            continue
        todo, seen = [first], set()
        while todo:
            node = todo.pop()
            if node.op == "output":
                what = f"{op_name(first)!r} ({first})"
                raise NotALanguageModelLossError(
                    f"the logits also feed {what}, which reaches the loss or another output with a gradient; "
                    "compute it from logits.detach() if it needs none"
                )
            if node not in seen and differentiable(node):  # else an accuracy, an argmax: a metric
                seen.add(node)
                todo.extend(node.users)
