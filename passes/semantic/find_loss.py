"""Finds the language-model loss: head -> (cast, scale, soft-cap, shift, reshape) -> cross-entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cggr_compile.causes import Cause
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass, refused
from cggr_compile.passes.facts import LossSite
from cggr_compile.passes.fx import layout_only
from cggr_compile.passes.nodes import argument, differentiable, fake_value, op_name, same_size, shape_of

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

CASTS = ("float", "to", "type", "half", "bfloat16", "double", "type_as")


class NotALanguageModelLossError(Exception):
    """Why the graph's cross-entropy is not one that this pass understands: in words, and its kind."""

    def __init__(self, what: str, cause: Cause = Cause.UNSUPPORTED_LOSS) -> None:
        super().__init__(what)
        self.refusal = refused(cause, what=what)


@dataclass
class _Walk:
    """What the walk from the cross-entropy up to the head has passed."""

    start: int = 0
    scale: float = 1.0
    softcap: float = 0.0


class FindLoss(SemanticPass):
    """Records head, target and cross-entropy in ``ctx[LossSite]``; changes nothing.

    Finds, in any of the spellings of transformers and plain PyTorch::

        logits = linear(hidden, lm_head)              # head
        logits = tanh(logits / 30.0) * 30.0           # soft-cap, optional
        loss = cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))

    The target is taken as the loss computes it, so whatever shift the user applies is the one that is scored.
    """

    name = "find_loss"
    provides = (LossSite,)
    analysis = True

    def enabled(self, ctx: GraphContext) -> bool:
        return True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        losses = [node for node in gm.graph.nodes if _is_cross_entropy(node)]
        if not losses:
            return refused(Cause.NO_LOSS)
        if len(losses) > 1:
            return refused(Cause.UNSUPPORTED_LOSS, what=f"{len(losses)} cross-entropies in one graph")
        try:
            site = _read_site(losses[0])
            _check_other_uses(gm, site)
        except NotALanguageModelLossError as why:
            return why.refusal
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


def _is_cross_entropy(node: Node) -> bool:
    return node.op == "call_function" and op_name(node) in ("cross_entropy", "cross_entropy_loss")


def _read_site(loss: Node) -> LossSite:
    private = op_name(loss) == "cross_entropy_loss"  # aten order: (input, target, weight, reduction, ...)
    logits, target = argument(loss, 0, "input"), argument(loss, 1, "target")
    if argument(loss, 2, "weight") is not None:
        raise NotALanguageModelLossError("cross-entropy with class weights")
    if private:
        reduction = {0: "none", 1: "mean", 2: "sum"}[argument(loss, 3, "reduction", 1)]
        ignore_index, smoothing = argument(loss, 4, "ignore_index", -100), argument(loss, 5, "label_smoothing", 0.0)
    else:
        if argument(loss, 3, "size_average") is not None or argument(loss, 5, "reduce") is not None:
            raise NotALanguageModelLossError("cross-entropy with the deprecated size_average/reduce arguments")
        ignore_index, reduction = argument(loss, 4, "ignore_index", -100), argument(loss, 6, "reduction", "mean")
        smoothing = argument(loss, 7, "label_smoothing", 0.0)
    if reduction not in ("mean", "sum"):  # none: the user weighs tokens in a way of his own
        raise NotALanguageModelLossError(f"cross-entropy with reduction={reduction!r}")
    if fake_value(target).is_floating_point():
        raise NotALanguageModelLossError("cross-entropy with class probabilities as the target")

    walk = _Walk()
    head, chain = _climb_to_head(logits, walk)
    hidden, weight, bias, transposed = _read_head(head)
    return LossSite(
        loss=loss,
        head=head,
        weight=weight,
        bias=bias,
        transposed=transposed,
        hidden=hidden,
        chain=tuple(chain),
        target=target,
        vocab=shape_of(head)[-1],
        start=walk.start,
        scale=walk.scale,
        softcap=walk.softcap,
        reduction="mean" if reduction == "mean" else "sum",
        ignore_index=ignore_index,
        label_smoothing=smoothing,
    )


def _climb_to_head(node: Node, walk: _Walk) -> tuple[Node, list[Node]]:
    chain: list[Node] = []
    outer = 1.0  # product of the factors met below (after) the current node
    while True:
        chain.append(node)
        name = op_name(node)
        if _is_head(node):
            break
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if source is None or node.op == "placeholder":
            raise NotALanguageModelLossError(str(node), Cause.NO_HEAD)
        if name in CASTS or layout_only(node) or _swaps_class_axis(node):
            pass
        elif name in ("mul", "div") and (factor := _scalar_factor(node)) is not None:
            outer *= factor
        elif name == "tanh" and not walk.softcap:
            # softcap * tanh(z / softcap): the factor after the tanh is the cap
            walk.softcap, outer = outer, 1.0
            if walk.softcap <= 0:
                raise NotALanguageModelLossError(f"logit soft-cap of {walk.softcap}")
        elif name == "getitem" and (begin := token_slice(node)) is not None:
            walk.start += begin
        else:
            raise NotALanguageModelLossError(f"operator {name!r} between head and cross-entropy")
        node = source
    walk.scale = outer * walk.softcap if walk.softcap else outer
    if walk.softcap and math.isclose(walk.scale, 1.0, rel_tol=1e-12):
        walk.scale = 1.0
    return node, chain[::-1]


def _is_head(node: Node) -> bool:
    if op_name(node) == "linear":
        return True
    return op_name(node) == "matmul" and _transposed_weight(node) is not None


def _transposed_weight(node: Node) -> Any:
    """W of ``hidden @ W.T`` (or a stored [H, V] matrix)."""
    right = argument(node, 1, "other")
    if right is None or len(shape_of(right)) != 2:
        return None
    return right


def _read_head(head: Node) -> tuple[Node, Node, Node | None, bool]:
    hidden = head.args[0] if head.args else head.kwargs["input"]
    if op_name(head) == "linear":
        return hidden, argument(head, 1, "weight"), argument(head, 2, "bias"), False  # type: ignore[return-value]
    return hidden, _transposed_weight(head), None, True  # type: ignore[return-value]


def _scalar_factor(node: Node) -> float | None:
    """c of ``x * c``, ``c * x`` or ``x / c`` with a Python number."""
    left, right = argument(node, 0, "input"), argument(node, 1, "other")
    if isinstance(right, (int, float)):
        return float(right) if op_name(node) == "mul" else 1.0 / float(right)
    if isinstance(left, (int, float)) and op_name(node) == "mul":
        return float(left)
    return None


def _swaps_class_axis(node: Node) -> bool:
    """[B, S, V] -> [B, V, S], the layout that cross_entropy takes for sequences."""
    name = op_name(node)
    if name not in ("transpose", "swapaxes", "permute", "mT") or len(shape_of(node)) != 3:
        return False
    if name == "mT":
        return True
    axes: Any = node.args[1:]
    if len(axes) == 1:  # permute(x, (0, 2, 1))
        axes = axes[0]
    axes = [axis % 3 for axis in axes]
    return axes == [0, 2, 1] if name == "permute" else sorted(axes) == [1, 2]


def token_slice(node: Node) -> int | None:
    """First kept position of a slice along axis 1 of [B, S, ...]; None for any other indexing.

    Slices with a step, from the end, or along other axes are not token slices; full slices start at 0.
    """
    source = node.all_input_nodes[0]
    index = node.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    rank = len(shape_of(source))
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (rank - len(items) + 1)
    begin = 0
    for axis, item in enumerate(items):
        if not isinstance(item, slice) or item.step not in (None, 1):
            return None
        before, after = shape_of(source)[axis], shape_of(node)[axis]
        if same_size(before, after):
            continue
        if axis != 1 or rank != 3 or not (item.start is None or (isinstance(item.start, int) and item.start >= 0)):
            return None
        begin = item.start or 0
    return begin


def returned_logits(site: LossSite) -> set[Node]:
    """The logits, and what is the logits in another dtype, layout, scale or for some of the positions, [..., V]."""
    found = set(site.chain)
    todo = list(site.chain)
    while todo:
        for user in todo.pop().users:
            if user not in found and _same_logits(user, site.vocab):
                found.add(user)
                todo.append(user)
    return found


def _same_logits(node: Node, vocab: int) -> bool:
    shape = shape_of(node)
    if len(node.all_input_nodes) != 1 or not shape or not same_size(shape[-1], vocab):
        return False
    name = op_name(node)
    if name in ("mul", "div"):
        return _scalar_factor(node) is not None
    return name in (*CASTS, "tanh", "getitem", "narrow") or layout_only(node)


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
