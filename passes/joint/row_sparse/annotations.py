"""The first half of the pass: which values are on rows, and what becomes of each call. The graph stays as it is.

Annotate, then apply, as in Inductor's auto_chunker. Two things are simpler here:

- It is a walk in the order of the graph and no fixed point: rows come into being at the markers and go forward only, so
  that every operand is known when its reader is looked at. Which rows are wanted of a saved activation goes the other
  way; that is asked for while the plans are carried out (``RowValues.rows_of``), because only what is asked for may be
  computed.
- The plans are carried out in place, and no ``fx.Interpreter`` builds the graph anew: most of it stays, and its nodes
  carry what the partitioner and the other passes go by. Plain functions are copied in by one (``Emitter.trace``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from cggr_compile.passes.joint.row_sparse.attention import attention
from cggr_compile.passes.joint.row_sparse.division import Division
from cggr_compile.passes.joint.row_sparse.layout import Layout, Tag, align, canonical, resize
from cggr_compile.passes.joint.row_sparse.plan import At, Densify
from cggr_compile.passes.joint.row_sparse.rule import rule_of
from cggr_compile.passes.nodes import shape_of
from cggr_compile.passes.patterns.attention import find_backward

if TYPE_CHECKING:
    from cggr_compile.passes.joint.row_sparse.plan import Plan


@dataclass
class Annotations:
    """What is known of the graph, for ``batch`` sequences of ``length`` positions with ``slots`` selected rows each.

    Attributes:
        layouts: of the values that are on rows.
        divisions: of the values of which some columns are on rows.
        plans: what becomes of each call that reads such a value, or makes the first one.
        backward: the nodes that depend on a gradient: their dense value may never be needed.
        dense_attention: how many attention backwards stay dense, by the reason.
    """

    batch: int
    length: int
    slots: int
    backward: set[Node] = field(default_factory=set)
    layouts: dict[Node, Layout] = field(default_factory=dict)
    divisions: dict[Node, Division] = field(default_factory=dict)
    plans: dict[Node, Plan] = field(default_factory=dict)
    dense_attention: Counter[str] = field(default_factory=Counter)

    def annotate(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            plan = self._plan(node)
            if plan is None:
                continue
            self.plans[node] = plan
            for value, found in plan.results(node).items():
                if isinstance(found, Division):
                    self.divisions[value] = found
                else:
                    self.layouts[value] = found

    def _plan(self, node: Node) -> Plan | None:
        rule = rule_of(node.target)
        sparse = tuple(operand for operand in node.all_input_nodes if operand in self.layouts)
        divided = tuple(operand for operand in node.all_input_nodes if operand in self.divisions)
        if divided and not rule.begins:
            plan = rule.divided(self, node) if len(divided) == 1 and not sparse else None
            return Densify((*sparse, *divided)) if plan is None else plan
        if not sparse and not rule.begins:
            return None
        call = find_backward(node)
        plan = rule.carry(self, node) if call is None else attention(self, call)
        return Densify(sparse) if plan is None else plan

    @property
    def densified(self) -> dict[Node, int]:
        """The calls that get full tensors instead of rows, and how many each."""
        return {node: len(plan.operands) for node, plan in self.plans.items() if isinstance(plan, Densify)}

    # what the rules ask

    def layout(self, *tags: Tag) -> Layout:
        return canonical(tags, self.batch)

    def layout_of(self, value: Any) -> Layout | None:
        return self.layouts.get(value) if isinstance(value, Node) else None

    def sizes(self, node: Node, layout: Layout) -> list[int]:
        """The shape of the rows of ``node``."""
        return resize(shape_of(node), layout, self.batch, self.slots)

    def aligned(self, node: Node, layout: Layout) -> tuple[Any, ...] | None:
        """The arguments of an elementwise call on rows, or None if an operand does not line up."""
        if any(isinstance(argument, Node) for argument in node.kwargs.values()):
            return None
        operands: list[Any] = []
        for argument in node.args:
            if not isinstance(argument, Node) or not shape_of(argument):
                operands.append(argument)
                continue
            operand = self.operand(argument, layout, shape_of(node))
            if operand is None:
                return None
            operands.append(operand)
        return tuple(operands)

    def operand(self, node: Node, layout: Layout, shape: Sequence[int]) -> At | None:
        """The rows of what broadcasts to ``shape`` with ``layout``; None if it does not line up."""
        mine = align(layout, shape, shape_of(node))
        if mine is not None:
            return At(node, mine)
        # no batch axis of its own: give it one
        mine = align(layout, shape, [*[1] * (len(shape) - len(shape_of(node))), *shape_of(node)])
        return None if mine is None else At(node, mine, len(shape))
