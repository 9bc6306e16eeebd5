"""The row-sparse backward: computes only the selected rows of a backward pass that is zero on all others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from cggr_compile.passes.base import JointPass, PassResult
from cggr_compile.passes.fx import descendants, is_static
from cggr_compile.passes.joint.row_sparse import rules  # noqa: F401  (registers them)
from cggr_compile.passes.joint.row_sparse.annotations import Annotations
from cggr_compile.passes.joint.row_sparse.placement import place_early
from cggr_compile.passes.joint.row_sparse.stages import separate, stages
from cggr_compile.passes.joint.row_sparse.values import RowValues
from cggr_compile.passes.joint.selections import JointSelection, find_selections
from cggr_compile.passes.nodes import shape_of
from cggr_compile.passes.patterns.attention import is_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import Graph, Node

ops, aten = torch.ops.cggr, torch.ops.aten


class RowSparseBackward(JointPass):
    """Carries "rows at idx, zero elsewhere" through AOTAutograd's joint graph. Exact: no number changes its meaning.

    Before::

        g = cggr.scatter_rows(dh, rows, keep, S)              # [B, S, H], K rows of S are not zero; one or several
        dx = mm(g.view(B * S, H), W)                          # all rows
        dW = mm(g.view(B * S, H).permute(1, 0), x)            # all rows

    After::

        dx_rows = mm(dh.view(B * K, H), W)
        dW = mm(dh.view(B * K, H).permute(1, 0), x[flat_rows])

    An operator without a rule gets the full tensor back (scatter into zeros). The report counts these by name
    (``densified``) and says which modules they belong to (``densified_at``); an attention whose backward stays dense
    is counted by the reason why (``dense_attention``).
    """

    name = "row_sparse"
    optional = True

    def __call__(self, graph: Graph) -> PassResult:
        selections = find_selections(graph)
        if not selections:
            return PassResult(False, "no cggr::scatter_rows in the joint graph")
        if len(selections) > 1 and not _apart(graph, selections):
            return PassResult(False, "several selections in one joint graph")
        if not all(is_static(one.seeds[0], one.rows) and isinstance(one.length, int) for one in selections):
            return PassResult(False, "symbolic sizes: the backward stays dense (mark the sizes static to change that)")
        found = _Found()
        for selection in selections:
            _carry(graph, selection, len(selections) == 1, found)
        details = {
            "densified": dict(found.densified),
            "densified_at": found.places,
            "dense_attention": dict(found.dense_attention),
        }
        return PassResult(True, str(found), details)


@dataclass
class _Found:
    """What came of all selections."""

    values: int = 0
    densified: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str | None]] = field(default_factory=dict)
    dense_attention: Counter[str] = field(default_factory=Counter)

    def add(self, at: Annotations, places: dict[str, list[str | None]]) -> None:
        self.values += len(at.layouts)
        for node, count in at.densified.items():
            self.densified[str(node.target)] += count
        for operator, each in places.items():
            self.places.setdefault(operator, []).extend(each)
        self.dense_attention += at.dense_attention

    def __str__(self) -> str:
        text = f"{self.values} values on rows, {self.densified.total()} made dense again"
        if not self.dense_attention:
            return text
        named = ", ".join(f"{count} × {why}" for why, count in self.dense_attention.items())
        return f"{text}; dense attention: {named}"


def _apart(graph: Graph, selections: list[JointSelection]) -> bool:
    """Whether the gradient of one selection alone comes to every place where gradient ends."""
    markers = graph.find_nodes(op="call_function", target=ops.detach_unselected_backward.default)
    return all(sum(marker in one.backward for one in selections) == 1 for marker in markers)


def _carry(graph: Graph, selection: JointSelection, alone: bool, found: _Found) -> None:
    """Carry the rows of one selection through the graph; ``alone``: there is no other one."""
    seed, rows = selection.seeds[0], selection.rows
    nodes, backward = list(graph.nodes), descendants(selection.seeds)
    at = Annotations(shape_of(seed)[0], selection.length, shape_of(rows)[1], backward=backward)
    behind = nodes[nodes.index(seed) :]
    at.annotate(behind if alone else [node for node in behind if node in backward])
    places = _places(at, nodes)
    rv = RowValues(graph, rows, selection.keep, at)
    rv.factors = selection.factors
    with rv.emit.before(seed, RowSparseBackward.name):
        rv.rows = rv.emit.call(ops.fusion_barrier.default, rows)
    rv.stage = stages(nodes[: nodes.index(seed)], rows)
    for node, plan in at.plans.items():
        with rv.emit.before(node, RowSparseBackward.name):
            plan.apply(rv, node)
    graph.eliminate_dead_code()
    separate(rv, set(graph.nodes).difference(nodes))
    place_early(graph, set(graph.nodes).difference(nodes))
    found.add(at, places)


def _places(at: Annotations, nodes: Sequence[Node]) -> dict[str, list[str | None]]:
    """The modules whose gradients are made dense, by operator."""
    layers = {_layer(node) for node in nodes if is_attention(node) or node.target is aten._softmax.default} - {None}
    order = {node: i for i, node in enumerate(nodes)}
    layers_end = max((i for i, node in enumerate(nodes) if _layer(node) in layers), default=len(nodes))
    places: dict[str, list[str | None]] = {}
    for node in at.densified:
        place = _place(node)
        # behind the first layer's gradient, an unknown module is none of the layers
        places.setdefault(str(node.target), []).append("" if place is None and order[node] > layers_end else place)
    return places


def _place(node: Node) -> str | None:
    """The module whose gradient a node computes, such as model.layers.0.mlp; "" is the outermost, None is unknown."""
    stack = node.meta.get("fwd_nn_module_stack") or node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return ".".join(paths[-1].split(".")[1:]) if paths else None


def _layer(node: Node) -> str | None:
    """The module path up to the layer's number, such as model.layers.0; None if there is no number."""
    parts = (_place(node) or "").split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else None
