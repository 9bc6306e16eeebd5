"""Products with weights and norms, over the last axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cggr_compile.passes.nodes import argument, shape_of
from cggr_compile.passes.patterns.token_values.layout import FEATURE
from cggr_compile.passes.patterns.token_values.planner import NotByPositionError, Planned, Planner, rule

if TYPE_CHECKING:
    from torch.fx import Node


@rule("linear", "matmul")
def product(planner: Planner, node: Node) -> Planned:
    """A product of the last axis with a weight that all positions share."""
    source, plan = planner.source(node)
    rest = {name: value for name, value in node.kwargs.items() if name != "input"}
    others = [n for n in (*node.args[1:], *rest.values()) if hasattr(n, "meta")]
    weights = all(n not in planner.behind and len(shape_of(n)) <= 2 for n in others)
    width = shape_of(node)[-1:]
    if plan.layout.axes[-1] != FEATURE or not weights or len(shape_of(node)) != len(shape_of(source)):
        raise NotByPositionError(f"multiplies logits with something else than a weight ({node})")
    features = [*plan.layout.features[:-1], *width]
    classes = [*plan.layout.classes[:-1], node in planner.heads]
    args = [plan.ref, *node.args[1:]] if node.args else []
    kwargs = rest if node.args else {**rest, "input": plan.ref}
    return Planned(plan.layout.with_features(features, classes), planner.call(node, args, kwargs))


@rule("layer_norm", "rms_norm")
def norm(planner: Planner, node: Node) -> Planned:
    """A norm over the last axis."""
    _, plan = planner.source(node)
    over: Any = argument(node, 1, "normalized_shape")
    if len(over) != 1 or plan.layout.axes[-1] != FEATURE or any(n in planner.behind for n in node.all_input_nodes[1:]):
        raise NotByPositionError(f"has a norm over positions ({node})")
    return Planned(plan.layout, planner.call(node, [plan.ref, *node.args[1:]], dict(node.kwargs)))
