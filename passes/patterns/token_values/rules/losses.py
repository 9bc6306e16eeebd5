"""The rules of PyTorch's losses with reduction="none", and what their other reductions are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from cggr_compile import compat
from cggr_compile.passes.nodes import differentiable, fake_value, op_name, shape_of
from cggr_compile.passes.patterns.token_values.layout import BATCH, FEATURE, FLAT, TOKEN
from cggr_compile.passes.patterns.token_values.planner import NotByPositionError, Planned, Planner, rule
from cggr_compile.passes.patterns.token_values.program import INLINE
from cggr_compile.passes.patterns.token_values.rules.pointwise import pointwise

if TYPE_CHECKING:
    from torch.fx import Node

# Losses that compare two tensors entry by entry.
ELEMENTWISE = {
    *("kl_div", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "poisson_nll_loss"),
    "binary_cross_entropy_with_logits",
}
# Losses of a class out of several.
OF_CLASSES = {"cross_entropy", "cross_entropy_loss", "nll_loss", "nll_loss_nd"}
_REDUCTIONS = {0: "none", 1: "mean", 2: "sum"}  # ATen's numbers


@dataclass(frozen=True)
class LossCall:
    """The arguments of a loss of PyTorch.

    Attributes:
        logits: or log-probabilities. function: the loss of ``torch.nn.functional``.
        others: the arguments besides, by name, without the deprecated ones.
    """

    function: Any
    logits: Node
    target: Node
    reduction: str
    others: dict[str, Any]

    @property
    def weight(self) -> Node | None:
        weight: Node | None = self.others.get("weight")
        return weight

    @property
    def ignore_index(self) -> int:
        return int(self.others.get("ignore_index", -100))

    @property
    def soft(self) -> bool:
        """Whether the target is a probability for each class."""
        return bool(fake_value(self.target).is_floating_point())


def read_loss(node: Node) -> LossCall | None:
    """A call of one of these losses; None for any other call, or one with deprecated arguments."""
    name = op_name(node).partition(".")[0]
    if node.op != "call_function" or name not in ELEMENTWISE | OF_CLASSES:
        return None
    function = getattr(F, {"cross_entropy_loss": "cross_entropy", "nll_loss_nd": "nll_loss"}.get(name, name))
    known = node.target is function or node.target in compat.CROSS_ENTROPIES or name == "nll_loss_nd"
    call = node.normalized_arguments(node.graph.owning_module, normalize_to_only_use_kwargs=True) if known else None  # type: ignore[arg-type]
    if call is None:
        return None
    given: dict[str, Any] = dict(call.kwargs)
    if given.pop("size_average", None) is not None or given.pop("reduce", None) is not None:
        return None
    logits = given.pop("input", None) or given.pop("self", None)
    target, reduction = given.pop("target", None), given.pop("reduction", "mean")
    if not hasattr(logits, "meta") or not hasattr(target, "meta"):
        return None
    return LossCall(function, logits, target, _REDUCTIONS.get(reduction, reduction), given)


@rule(*OF_CLASSES)
def of_classes(planner: Planner, node: Node) -> Planned:
    """The loss of every position for its own class."""
    call, plan = _read(planner, node)
    layout, sizes = plan.layout, shape_of(call.logits)
    if layout.axes not in ((FLAT, FEATURE), (BATCH, FEATURE, TOKEN)):
        raise NotByPositionError(f"is a {op_name(node)!r} ({node}) over another axis than that of the classes")
    found = layout.without([1])
    if differentiable(call.target) and call.target in planner.behind:
        raise NotByPositionError(f"is a {op_name(node)!r} ({node}) whose target is computed from the logits")
    if call.soft:
        target = planner.aligned(node, call.target, layout, sizes)
    else:
        target = planner.taken(node, call.target, found)
        # a row that has no value here may have any target
        target = planner.other_call(node, INLINE, known_labels, (target, sizes[1], call.ignore_index))
    if any(n in planner.behind for n in (call.weight,) if n is not None):
        raise NotByPositionError(f"is a {op_name(node)!r} ({node}) whose class weights depend on the logits")
    kwargs = {name: value for name, value in call.others.items() if value is not None}
    made = planner.other_call(node, INLINE, by_rows, (call.function, plan.ref, target), kwargs)
    return Planned(found, made)


def known_labels(target: Any, classes: int, ignore_index: int) -> Any:
    """The target [B, K], with the ignored index where it is no class."""
    return torch.where((target >= 0) & (target < classes), target, ignore_index)


def by_rows(function: Any, logits: Any, target: Any, **kwargs: Any) -> Any:
    """The loss of each row of [B, K, V], [B, K]."""
    each = function(logits.flatten(0, 1), target.flatten(0, 1), reduction="none", **kwargs)
    return each.view_as(logits.select(2, 0))


@rule(*ELEMENTWISE)
def elementwise(planner: Planner, node: Node) -> Planned:
    """The loss of every entry."""
    _read(planner, node)
    return pointwise(planner, node)


def _read(planner: Planner, node: Node) -> tuple[LossCall, Planned]:
    call = read_loss(node)
    if call is None:
        raise NotByPositionError(f"is a {op_name(node)!r} ({node}) with arguments that are not understood")
    if call.reduction != "none":
        raise NotByPositionError(f"is a {op_name(node)!r} ({node}) with reduction={call.reduction!r}")
    if call.logits not in planner.behind or not differentiable(call.logits):
        if op_name(node) in OF_CLASSES:
            raise NotByPositionError(f"is a {op_name(node)!r} ({node}) that differentiates its target")
        return call, planner.plan(call.target)
    return call, planner.plan(call.logits)
