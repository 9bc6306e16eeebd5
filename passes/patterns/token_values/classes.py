"""The classes that per-token values are of: what a router scores by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cggr_compile.passes.fx import ancestors
from cggr_compile.passes.nodes import argument, differentiable, fake_value, op_name
from cggr_compile.passes.patterns.token_values.layout import FEATURE
from cggr_compile.passes.patterns.token_values.operands import base_of
from cggr_compile.passes.patterns.token_values.program import Taken
from cggr_compile.passes.patterns.token_values.rules.head_values import is_head_of_values, labels_of
from cggr_compile.passes.patterns.token_values.rules.losses import OF_CLASSES, read_loss

if TYPE_CHECKING:
    from torch.fx import Node

    from cggr_compile.passes.patterns.token_values.planner import Planner
    from cggr_compile.passes.patterns.token_values.region import TokenRegion


def classes_of_values(region: TokenRegion) -> Taken | None:
    """The classes that the first value is of which has some for every sequence of the batch."""
    planner = region.planner
    count = planner.found[region.stem].layout.window.count
    for value in region.values:
        inside = ancestors([value], only=lambda n: n in planner.found)
        for node in sorted(inside):
            found = _classes(planner, node)
            window = found.layout.window if found is not None else None
            if window is not None and window.full and (window.first, window.count) == (0, count):
                return found
    return None


def _classes(planner: Planner, node: Node) -> Taken | None:
    index: Any = None
    loss, layout = read_loss(node), planner.found[node].layout
    if loss is not None and op_name(node) in OF_CLASSES and not loss.soft:
        index = loss.target
    elif is_head_of_values(node):
        index = labels_of(node)
    elif op_name(node) in ("gather", "take_along_dim"):
        index = argument(node, 2 if op_name(node) == "gather" else 1, "index", node.kwargs.get("indices"))
        layout = layout.with_features(layout.features, [False] * len(layout.features))
        if any(size != 1 for size in layout.features):
            return None
    elif op_name(node) == "getitem" and isinstance(node.args[1], tuple):
        index = node.args[1][-1]
        if not hasattr(index, "meta") or FEATURE in layout.axes:
            return None
    if index is None or not hasattr(index, "meta") or differentiable(index) or not planner.unwritten(index):
        return None
    if fake_value(index).is_floating_point() or index in planner.behind:
        return None
    base, at = base_of(index, layout, planner.unwritten)
    return Taken(base, at, None)
