"""How one operator, or a class of operators, treats rows: the base of all rules, and their register."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from cggr_compile import compat

if TYPE_CHECKING:
    from torch.fx import Node

    from cggr_compile.passes.joint.row_sparse.annotations import Annotations
    from cggr_compile.passes.joint.row_sparse.layout import Layout
    from cggr_compile.passes.joint.row_sparse.plan import Call, Plan

RuleType = TypeVar("RuleType", bound="type[Rule]")


class Rule:
    """One operator's rows, in both directions. Rules plan; they leave the graph alone.

    Attributes:
        mixes: what a position of the result depends on: "nothing" but the same elements of the operands, the
            "features" of this position, or other "positions" as well.
        begins: whether the result is on rows whatever the operands are.
    """

    mixes: ClassVar[Literal["nothing", "features", "positions"]] = "positions"
    begins: ClassVar[bool] = False

    def carry(self, at: Annotations, node: Node) -> Plan | None:
        """From operands to the result: ``node`` has an operand that is zero outside of its rows.

        None: not handled, the operator gets full tensors.
        """
        return None

    def divided(self, at: Annotations, node: Node) -> Plan | None:
        """From operands to the result: some columns of an operand, and of no other, are zero outside of its rows.

        None: not handled, the operator gets the full tensor.
        """
        return None

    def recompute(self, at: Annotations, node: Node, layout: Layout) -> Call | None:
        """From the result to the operands: the call that makes the rows ``layout`` of ``node``, which is not sparse.

        None: they are gathered from ``node``.
        """
        return None


# by operator; by name where torch registers the operator only with a module that is not imported here
RULES: dict[Any, Rule] = {}
# for operators that are not in RULES
CLASSES: list[tuple[Callable[[compat.OpOverload], bool], Rule]] = []


def rule(*targets: Any) -> Callable[[RuleType], RuleType]:
    """Registers a class of rule for these operators."""

    def register(kind: RuleType) -> RuleType:
        RULES.update(dict.fromkeys(targets, kind()))
        return kind

    return register


def rule_for_class(belongs: Callable[[compat.OpOverload], bool]) -> Callable[[RuleType], RuleType]:
    """Registers a class of rule for all operators that ``belongs`` is true of and no other rule is for."""

    def register(kind: RuleType) -> RuleType:
        CLASSES.append((belongs, kind()))
        return kind

    return register


def rule_of(target: Any) -> Rule:
    return RULES.get(target) or RULES.get(str(target)) or _of_class(target)


@cache
def _of_class(target: Any) -> Rule:
    if isinstance(target, compat.OpOverload):
        for belongs, found in CLASSES:
            if belongs(target):
                return found
    return Rule()
