"""The row-sparse backward: computes only the selected rows of a backward pass that is zero on all others."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from cggr_compile.passes.base import JointPass, PassResult
from cggr_compile.passes.fx import descendants, is_static
from cggr_compile.passes.joint.row_sparse import rules  # noqa: F401  (registers them)
from cggr_compile.passes.joint.row_sparse.annotations import Annotations
from cggr_compile.passes.joint.row_sparse.placement import place_early
from cggr_compile.passes.joint.row_sparse.stages import separate, stages
from cggr_compile.passes.joint.row_sparse.values import RowValues
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
        seeds = graph.find_nodes(op="call_function", target=ops.scatter_rows.default)
        if not seeds:
            return PassResult(False, "no cggr::scatter_rows in the joint graph")
        if len({seed.args[1:] for seed in seeds}) > 1:
            return PassResult(False, "several selections in one joint graph")
        seed = seeds[0]
        _, rows, keep, length = seed.args
        if not is_static(seed, rows) or not isinstance(length, int):
            return PassResult(False, "symbolic sizes: the backward stays dense (mark the sizes static to change that)")
        nodes = list(graph.nodes)
        at = Annotations(shape_of(seed)[0], length, shape_of(rows)[1], backward=descendants(seeds))
        at.annotate(nodes[nodes.index(seed) :])
        places = _places(at, nodes)
        rv = RowValues(graph, rows, keep, at)
        with rv.emit.before(seed, self.name):
            rv.rows = rv.emit.call(ops.fusion_barrier.default, rows)
        rv.stage = stages(nodes[: nodes.index(seed)], rows)
        for node, plan in at.plans.items():
            with rv.emit.before(node, self.name):
                plan.apply(rv, node)
        graph.eliminate_dead_code()
        separate(rv, set(graph.nodes).difference(nodes))
        place_early(graph, set(graph.nodes).difference(nodes))
        densified: Counter[str] = Counter()
        for node, count in at.densified.items():
            densified[str(node.target)] += count
        reason = f"{len(at.layouts)} values on rows, {densified.total()} made dense again"
        if at.dense_attention:
            named = ", ".join(f"{count} × {why}" for why, count in at.dense_attention.items())
            reason += f"; dense attention: {named}"
        details = {
            "densified": dict(densified),
            "densified_at": places,
            "dense_attention": dict(at.dense_attention),
        }
        return PassResult(True, reason, details)


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
