"""Plans the calls behind a hidden state position by position: layouts, and a program that computes the same of rows."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cggr_compile.passes.analysis.effects import draws, memory, mutated_operands, overlap
from cggr_compile.passes.analysis.modes import modes_of
from cggr_compile.passes.nodes import differentiable, fake_value, op_name, shape_of
from cggr_compile.passes.patterns.token_values.layout import BATCH, FEATURE, TOKEN, Layout, Window
from cggr_compile.passes.patterns.token_values.operands import base_of
from cggr_compile.passes.patterns.token_values.program import Call, Constant, Drawn, Program, Ref, Size, Stem, Taken

if TYPE_CHECKING:
    from torch.fx import Graph, Node


class NotByPositionError(Exception):
    """Why a call does not work position by position, in words that follow "the loss"."""


@dataclass(frozen=True)
class Planned:
    """A value: its layout, and where the program has it; or the parts of one that is several tensors."""

    layout: Layout
    ref: Ref
    parts: tuple[Planned, ...] = ()


Rule = Callable[["Planner", "Node"], Planned]
RULES: dict[str, Rule] = {}
KINDS: list[tuple[Callable[[Node], bool], Rule]] = []


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of operators, by their bare names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def rule_where(belongs: Callable[[Node], bool]) -> Callable[[Rule], Rule]:
    """Registers the rule of a kind of operators, for those that have none of their own."""

    def register(function: Rule) -> Rule:
        KINDS.append((belongs, function))
        return function

    return register


class Planner:
    """Plans the nodes of one graph, each once.

    Args:
        stem: the hidden state, [B, S, H]. heads: the products that make logits of it.
    """

    def __init__(self, graph: Graph, stem: Node, layout: Layout, heads: Container[Node]) -> None:
        self.graph, self.stem, self.heads = graph, stem, heads
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.modes = modes_of(graph)
        self.program = Program(self.order.__getitem__)
        self.written = [memory(operand) for node in graph.nodes for operand in mutated_operands(node)]
        self.behind: set[Node] = {stem}  # what depends on the hidden state
        for node in graph.nodes:
            if any(source in self.behind for source in node.all_input_nodes):
                self.behind.add(node)
        self.found: dict[Node, Planned] = {stem: Planned(layout, self.program.add(Stem(), stem.next, None))}
        self._failed: dict[Node, str] = {}

    def plan(self, node: Node) -> Planned:
        """The plan of a node behind the hidden state.

        Raises:
            NotByPositionError: it does not work position by position.
        """
        if node in self.found:
            return self.found[node]
        if node not in self._failed:
            try:
                self.found[node] = found = self._plan(node)
                return found
            except NotByPositionError as why:
                self._failed[node] = str(why)
        raise NotByPositionError(self._failed[node])

    def get(self, node: Node) -> Planned | None:
        """The plan of a node, if there is one."""
        try:
            return self.plan(node)
        except NotByPositionError:
            return None

    def _plan(self, node: Node) -> Planned:
        name = op_name(node)
        if node not in self.behind or node.op not in ("call_function", "call_method"):
            raise NotByPositionError(f"reads {node}, which is not computed from the hidden state")
        if mutated_operands(node):
            raise NotByPositionError(f"writes in place ({node})")
        if draws(node):
            if name == "dropout" and self.plan(self.source(node)[0]).layout == self.found[self.stem].layout:
                return self._drawn(node)
            raise NotByPositionError(f"draws random numbers ({node})")
        here, there = self.modes[node], self.modes[self.stem]
        if here.levels or there.levels or here.unknown is not there.unknown:
            raise NotByPositionError(f"is computed in torch.vmap, or behind a call of unknown effect ({node})")
        found = RULES.get(name) or next((rule for belongs, rule in KINDS if belongs(node)), None)
        if found is None:
            raise NotByPositionError(f"has an operator {name!r} ({node}), which may mix tokens")
        return found(self, node)

    def _drawn(self, node: Node) -> Planned:
        """Dropout of a hidden state: another draw for the rows would be another value."""
        layout = self.found[self.stem].layout
        if layout.flat:
            raise NotByPositionError(f"draws random numbers for tokens in one axis ({node})")
        return Planned(layout, self.program.add(Drawn(node), node.next, None))

    # What rules use.

    def source(self, node: Node, position: int = 0) -> tuple[Any, Planned]:
        """The operand of a call that has rows, and its plan."""
        operand: Any = node.args[position] if len(node.args) > position else node.kwargs.get("input")
        if operand not in self.behind or not differentiable(operand):
            raise NotByPositionError(f"has an operator {op_name(node)!r} ({node}) with its operands in another order")
        return operand, self.plan(operand)

    def call(self, node: Node, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Ref:
        """The call of a node, with other arguments."""
        return self.other_call(node, node.op, node.target, args, kwargs or {})

    def other_call(
        self, node: Node, op: str, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None
    ) -> Ref:
        """A call in place of a node's."""
        return self.program.add(Call(op, target, tuple(args), dict(kwargs or {})), node, self._mode(node))

    def reshape(self, node: Node, ref: Ref, features: Sequence[int]) -> Ref:
        """The value with its features in another shape."""
        return self.other_call(node, "call_method", "reshape", (ref, Size.BATCH, Size.ROWS, *features))

    def taken(self, node: Node, operand: Node, layout: Layout, shape: tuple[int, ...] | None = None) -> Ref:
        """Rows of an operand that is not computed here: of targets, masks, another model's logits."""
        base, at = (operand, layout) if shape is not None else base_of(operand, layout, self.unwritten)
        ref = self.program.add(Taken(base, at, shape), node, None)
        return ref if at.features == layout.features else self.reshape(node, ref, layout.features)

    def aligned(self, node: Node, operand: Any, layout: Layout, shape: Sequence[int]) -> Any:
        """An operand of a call whose value has this layout and shape, and broadcasts its operands to it."""
        value = fake_value(operand) if hasattr(operand, "meta") else operand
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            if isinstance(value, torch.Tensor) and differentiable(operand) and operand in self.behind:
                raise NotByPositionError(f"is scaled inside by {operand}, a number computed from the logits")
            return operand
        sizes, lead = shape_of(operand), len(shape) - value.dim()
        kinds = layout.axes[lead:]
        if operand in self.behind and differentiable(operand):
            plan = self.plan(operand)
            if plan.layout.axes != layout.axes or plan.layout.window != layout.window:
                raise NotByPositionError(f"combines logits of different positions ({node})")
            return plan.ref
        real = [kind != FEATURE and size == whole for kind, size, whole in zip(kinds, sizes, shape[lead:], strict=True)]
        features = tuple(size for kind, size in zip(kinds, sizes, strict=True) if kind == FEATURE)
        if not any(real):
            return operand if features == sizes else self.program.add(Constant(operand, features), node, None)
        whole = tuple(
            size if kind == FEATURE else full for kind, size, full in zip(kinds, sizes, shape[lead:], strict=True)
        )
        if lead:  # the sequences share it
            if layout.axes[:lead] != (BATCH,):
                raise NotByPositionError(f"reads {operand} of shape {list(sizes)} in a way that is not understood")
            whole = (shape[0], *whole)
        spread = None if whole == sizes else whole
        own = Layout(layout.axes, layout.window, features, (False,) * len(features))
        return self.taken(node, operand, own, spread)

    def unwritten(self, node: Node) -> bool:
        """Whether no call writes to what a node lies in."""
        return not any(overlap(written, memory(node)) for written in self.written)

    def _mode(self, node: Node) -> Any:
        return self.modes[node].records, self.modes[node].casts


def whole_layout(batch: int, length: int, features: int) -> Layout:
    """Of a hidden state [B, S, H]."""
    return Layout((BATCH, TOKEN, FEATURE), Window(0, batch, 0, length), (features,), (False,))
