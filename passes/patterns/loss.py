"""The cross-entropy as models write it, and the way from it up to the head: cast, scale, soft-cap, shift, reshape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cggr_compile import compat
from cggr_compile.causes import Cause
from cggr_compile.passes.base import refused
from cggr_compile.passes.facts import LossSite
from cggr_compile.passes.fx import layout_only
from cggr_compile.passes.nodes import fake_value, op_name, shape_of
from cggr_compile.passes.patterns.head import CASTS, is_head, read_head, scalar_factor, swaps_class_axis, token_slice

if TYPE_CHECKING:
    from torch.fx import Node


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


def is_cross_entropy(node: Node) -> bool:
    """PyTorch's own: an operator of somebody's that is named so may mean something else."""
    return node.op == "call_function" and node.target in compat.CROSS_ENTROPIES


def read_loss_site(loss: Node) -> LossSite:
    call = loss.normalized_arguments(loss.graph.owning_module, normalize_to_only_use_kwargs=True)  # type: ignore[arg-type]
    assert call is not None
    given: Any = call.kwargs
    if given["weight"] is not None:
        raise NotALanguageModelLossError("cross-entropy with class weights")
    if given.get("size_average") is not None or given.get("reduce") is not None:
        raise NotALanguageModelLossError("cross-entropy with the deprecated size_average/reduce arguments")
    logits, target, reduction = given["input"], given["target"], given["reduction"]
    reduction = {0: "none", 1: "mean", 2: "sum"}.get(reduction, reduction)  # ATen's numbers
    if reduction not in ("mean", "sum"):  # none: the user weighs tokens in a way of his own
        raise NotALanguageModelLossError(f"cross-entropy with reduction={reduction!r}")
    if fake_value(target).is_floating_point():
        raise NotALanguageModelLossError("cross-entropy with class probabilities as the target")

    walk = _Walk()
    head, chain = _climb_to_head(logits, walk)
    hidden, weight, bias, transposed = read_head(head)
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
        ignore_index=given["ignore_index"],
        label_smoothing=given["label_smoothing"],
    )


def scale_and_softcap(logits: Node) -> tuple[float, float]:
    """How logits are made of a head's products; see ``LossSite``.

    Raises:
        NotALanguageModelLossError: they are made in another way.
    """
    walk = _Walk()
    _climb_to_head(logits, walk)
    return walk.scale, walk.softcap


def _climb_to_head(node: Node, walk: _Walk) -> tuple[Node, list[Node]]:
    chain: list[Node] = []
    outer = 1.0  # product of the factors met below (after) the current node
    while True:
        chain.append(node)
        name = op_name(node)
        if is_head(node):
            break
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if source is None or node.op == "placeholder":
            raise NotALanguageModelLossError(str(node), Cause.NO_HEAD)
        if name in CASTS or layout_only(node) or swaps_class_axis(node):
            pass
        elif name in ("mul", "div") and (factor := scalar_factor(node)) is not None:
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
