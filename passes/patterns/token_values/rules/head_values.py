"""``cggr::token_log_probs``, in a user's code or in place of a library's head: head and values in one."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from cggr_compile.passes.nodes import fake_value, op_name
from cggr_compile.passes.patterns.token_values.layout import FEATURE
from cggr_compile.passes.patterns.token_values.planner import NotByPositionError, Planned, Planner, rule

if TYPE_CHECKING:
    from torch.fx import Node

NO_LABEL = -100  # others outside of the vocabulary are as well
_NAMES = ("token_log_probs", "token_log_probs.default")
_LABELS, _ROWS = 3, slice(4, 7)
SQUARES = 9  # the argument that asks for sums of squares


def is_head_of_values(node: Node) -> bool:
    """Whether a call is of the operator, with the gradient of all positions."""
    ours = "cggr" in str(node.target) and op_name(node) in _NAMES
    return ours and all(argument is None for argument in node.args[_ROWS])


def labels_of(node: Node) -> Node:
    """The labels [B, S] or [N] of the operator; every position without one has values 0, and no gradient."""
    return node.args[_LABELS]  # type: ignore[return-value]


@rule(*_NAMES)
def head_of_values(planner: Planner, node: Node) -> Planned:
    """The values of every position from its hidden state and its label."""
    _, plan = planner.source(node)
    if not is_head_of_values(node) or plan.layout.axes[-1] != FEATURE or len(plan.layout.features) != 1:
        raise NotByPositionError(f"is an operator {op_name(node)!r} ({node}) with rows of its own")
    layout = plan.layout.without([len(plan.layout.axes) - 1])
    labels = planner.taken(node, labels_of(node), layout)
    made = planner.call(node, [plan.ref, *node.args[1:_LABELS], labels, *node.args[_LABELS + 1 :]])
    refs = (
        planner.other_call(node, "call_function", operator.getitem, (made, i)) for i in range(len(fake_value(node)))
    )
    return Planned(layout, made, tuple(Planned(layout, ref) for ref in refs))
