"""The part of a graph from the hidden state to the per-token values: where heads begin and the vocabulary ends."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from cggr_compile.causes import Cause
from cggr_compile.passes.base import refused
from cggr_compile.passes.fx import ancestors, descendants
from cggr_compile.passes.nodes import differentiable, fake_value, op_name, shape_of
from cggr_compile.passes.patterns.forwards import embeddings, mixed
from cggr_compile.passes.patterns.token_values.heads import OF_LOGITS, find_heads, head_input
from cggr_compile.passes.patterns.token_values.layout import FEATURE, FLAT, Layout
from cggr_compile.passes.patterns.token_values.planner import NotByPositionError, Planned, Planner, whole_layout
from cggr_compile.passes.patterns.token_values.rules.along import SPLIT
from cggr_compile.passes.patterns.token_values.rules.losses import read_loss

if TYPE_CHECKING:
    from torch.fx import Graph, Node

    from cggr_compile.passes.facts import Forward


class NoTokenValuesError(Exception):
    """Why a graph has no per-token values: the outcome of the pass."""

    def __init__(self, what: str, cause: Cause = Cause.UNSUPPORTED_LOSS, **fields: object) -> None:
        super().__init__(what)
        self.refusal = refused(cause, what=what, **fields)


@dataclass
class TokenRegion:
    """What was found.

    Attributes:
        stem: the hidden state [B, S, H] that all heads read.
        heads: products that make logits of it, in order.
        planner: has the plan of every node of the region.
        logits: nodes with an axis over the vocabulary, in order.
        values: differentiable nodes without, which are computed from such, or read beside them, by what lies outside.
        splits: sums and means over positions and vocabulary at once.
    """

    stem: Node
    heads: tuple[Node, ...]
    planner: Planner
    logits: tuple[Node, ...]
    values: tuple[Node, ...]
    splits: tuple[Node, ...]

    def layout(self, node: Node) -> Layout:
        return self.planner.found[node].layout

    @property
    def final_logits(self) -> Node | None:
        """The logits that all of the values are probabilities of; None where they are of several, or never exist."""
        sources: set[Node] = set()
        for node in (*self.logits, *self.values):
            if op_name(node) in OF_LOGITS:
                source: Any = node.all_input_nodes[0]
                if source in self.planner.found and op_name(source) not in OF_LOGITS:
                    sources.add(source)
        return sources.pop() if len(sources) == 1 else None

    @property
    def beside(self) -> tuple[Node, ...]:
        """Differentiable tensors that go into the values behind the heads, and not by way of the hidden state."""
        readers = [n for n in (*self.logits, *self.values) if n not in self.heads]
        operands = [n for reader in readers for n in reader.all_input_nodes]
        return tuple(dict.fromkeys(n for n in operands if n not in self.planner.found and differentiable(n)))


def find_region(graph: Graph, forward: Forward | None = None) -> TokenRegion | None:
    """The region of a graph that has heads, None if it has none.

    Args:
        forward: that of one of several forwards.

    Raises:
        NoTokenValuesError: something of it does not work position by position.
    """
    heads = find_heads(graph)
    if forward is not None:
        own = embeddings(graph)
        heads = [head for head in heads if not forward.embeddings.isdisjoint(own[head])]
    if not heads:
        return None
    stem = _stem(graph, heads)
    sizes = shape_of(stem)
    if len(sizes) == 2:  # flat
        sizes = (*shape_of(_last_of_rank(graph, ancestors([stem]), 3))[:2], sizes[1])
    if not all(isinstance(size, int) for size in sizes):
        raise NoTokenValuesError("it is made of the values of single tokens, and sizes are symbolic")
    layout = whole_layout(*sizes)
    if len(shape_of(stem)) == 2:
        layout = replace(layout, axes=(FLAT, FEATURE))
    region = _region(graph, stem, heads, Planner(graph, stem, layout, frozenset(heads)))
    if forward is not None:
        _check_alone(region, forward)
    return region


def _check_alone(region: TokenRegion, forward: Forward) -> None:
    """Nothing with an axis over the vocabulary is computed with another forward, detached or not."""
    others = descendants(forward.others)
    for node in (*region.logits, *region.values, *region.splits):
        if node in others:
            raise NoTokenValuesError(f"{op_name(node)!r} ({node})", Cause.SEVERAL_FORWARDS)


def _stem(graph: Graph, heads: list[Node]) -> Node:
    """The last value [B, S, H] that all heads are computed from."""
    own = embeddings(graph)
    if mixed(own[head] for head in heads):
        raise NoTokenValuesError("one cross-entropy", Cause.SEVERAL_FORWARDS)
    common = set.intersection(*(ancestors([head_input(head)]) for head in heads))
    hidden = _last_of_rank(graph, common, 3)
    behind = common & descendants([hidden])
    batch, length, _ = shape_of(hidden)
    flat = [n for n in behind if len(shape_of(n)) == 2 and shape_of(n)[0] == batch * length and differentiable(n)]
    return max([hidden, *flat])


def _last_of_rank(graph: Graph, nodes: Container[Node], rank: int) -> Node:
    node: Node
    for node in reversed(graph.nodes):
        value = fake_value(node)
        if node in nodes and isinstance(value, torch.Tensor) and value.dim() == rank and differentiable(node):
            return node
    raise NoTokenValuesError("its logits are computed from no hidden state of shape [batch, sequence, hidden]")


def _region(graph: Graph, stem: Node, heads: Sequence[Node], planner: Planner) -> TokenRegion:
    logits: list[Node] = []
    values: list[Node] = []
    splits: list[Node] = []
    carrying: set[Node] = set()
    planned = dict.fromkeys(heads)
    for node in graph.nodes:
        if node.op == "output" or not differentiable(node):
            continue
        if node not in planned and not any(n in carrying for n in node.all_input_nodes):
            continue
        try:
            plan = planner.plan(node)
        except NotByPositionError as why:
            if _splits(planner, node, carrying):
                splits.append(node)
                continue
            raise NoTokenValuesError(f"it {why}") from why
        if has_classes(plan):
            logits.append(node)
        if plan.parts or has_classes(plan):
            carrying.add(node)
        else:
            values.append(node)
    inside = ancestors(carrying, only=lambda n: n in planner.found)
    for node in inside:
        if node is not stem and not planner.unwritten(node):
            raise NoTokenValuesError(f"its logits are written in place ({node})")
    for node in planner.found:
        if node in inside and node not in carrying and node not in values and _behind_heads(node, carrying, planner):
            values.append(node)
    ends = _lowered(planner, [n for n in values if any(user not in inside for user in n.users)], inside)
    return TokenRegion(stem, tuple(heads), planner, tuple(logits), tuple(ends), tuple(splits))


def has_classes(plan: Planned) -> bool:
    return any(map(has_classes, plan.parts)) if plan.parts else plan.layout.has_classes


def _behind_heads(node: Node, carrying: set[Node], planner: Planner) -> bool:
    return not ancestors([node], only=lambda n: n in planner.found).isdisjoint(carrying)


def _splits(planner: Planner, node: Node, carrying: set[Node]) -> bool:
    """Whether a call is a sum or mean over the vocabulary and positions."""
    loss = read_loss(node)
    if loss is not None and loss.reduction != "none":
        return True
    source: Any = node.args[0] if node.args else None
    return op_name(node) in SPLIT and source in carrying


def _lowered(planner: Planner, values: Iterable[Node], inside: set[Node]) -> list[Node]:
    """The values, further down where nothing else happens to them than arithmetic on each, views and joins.

    So the values of chunks are one.
    """
    found: dict[Node, None] = {}
    for node in values:
        while (user := _only_reader(node)) is not None and user not in inside and differentiable(user):
            plan = planner.get(user)
            sources = [n for n in user.all_input_nodes if shape_of(n)]
            refs = {other.ref for n in sources if (other := planner.found.get(n)) is not None}
            if plan is None or plan.parts or len(refs) != 1 or any(n not in planner.found for n in sources):
                break
            node = user
        found[node] = None
    return list(found)


def _only_reader(node: Node) -> Node | None:
    (*others, user) = node.users or [None]
    return None if others or user is None or user.op == "output" else user
