"""The row-sparse backward: computes only the selected rows of a backward pass that is zero on all others."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from cggr_compile.passes.base import PassResult, shape_of
from cggr_compile.passes.fx import descendants, is_static
from cggr_compile.passes.patterns.attention import is_attention
from cggr_compile.passes.resolve_markers import stop_factors, weighed
from cggr_compile.passes.row_sparse.attention import attention
from cggr_compile.passes.row_sparse.experts import experts
from cggr_compile.passes.row_sparse.placement import place_early
from cggr_compile.passes.row_sparse.rules import LATE_RULES, RULES, item
from cggr_compile.passes.row_sparse.stages import separate, stages
from cggr_compile.passes.row_sparse.values import Rows, RowValues

if TYPE_CHECKING:
    from torch.fx import Graph

ops, aten = torch.ops.cggr, torch.ops.aten


class RowSparseBackward:
    """Carries "rows at idx, zero elsewhere" through AOTAutograd's joint graph. Exact: no number changes its meaning.

    Before::

        g = cggr.scatter_rows(dh, rows, keep, S)              # [B, S, H], K rows of S are not zero
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

    def __call__(self, graph: Graph) -> PassResult:
        seeds = graph.find_nodes(op="call_function", target=ops.scatter_rows.default)
        if len(seeds) != 1:
            return PassResult(False, f"{len(seeds)} cggr::scatter_rows in the joint graph, expected one")
        (seed,) = seeds
        _, rows, keep, length = seed.args
        if not is_static(seed, rows) or not isinstance(length, int):
            return PassResult(False, "symbolic sizes: the backward stays dense (mark the sizes static to change that)")
        nodes = list(graph.nodes)
        rv = RowValues(graph, rows, keep, batch=shape_of(seed)[0], length=length)
        with rv.emit.before(seed, self.name):
            rv.rows = rv.emit.call(ops.fusion_barrier.default, rows)
        rv.backward = descendants([seed])
        rv.stage = stages(nodes[: nodes.index(seed)], rows)
        places: dict[str, list[str | None]] = {}
        layers = {_layer(node) for node in nodes if is_attention(node) or node.target is aten._softmax.default} - {None}
        layers_end = max((i for i, node in enumerate(nodes) if _layer(node) in layers), default=len(nodes))
        for index, node in enumerate(nodes[nodes.index(seed) :], nodes.index(seed)):
            before = rv.densified.total()
            with rv.emit.before(node, self.name):
                _visit(rv, node)
            if rv.densified.total() > before:
                place = _place(node)
                # behind the first layer's gradient, an unknown module is none of the layers
                places.setdefault(str(node.target), []).append("" if place is None and index > layers_end else place)
        graph.eliminate_dead_code()
        separate(rv, set(graph.nodes).difference(nodes))
        place_early(graph, set(graph.nodes).difference(nodes))
        total = sum(rv.densified.values())
        reason = f"{len(rv.sparse)} values on rows, {total} made dense again"
        if rv.dense_attention:
            named = ", ".join(f"{count} × {why}" for why, count in rv.dense_attention.items())
            reason += f"; dense attention: {named}"
        details = {
            "densified": dict(rv.densified),
            "densified_at": places,
            "dense_attention": dict(rv.dense_attention),
        }
        return PassResult(True, reason, details)


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


def _visit(rv: RowValues, node: Node) -> None:
    if node.target is ops.scatter_rows.default:
        layout = rv.layout("B", "S", None)
        values: Any = node.args[0]
        rv.sparse[node] = Rows(rv.kept(values, layout), layout)
        return
    if node.target is ops.stop_rows_backward.default:
        rv.sparse[node] = _stop(rv, node)
        return
    inputs = [n for n in node.all_input_nodes if n in rv.sparse]
    if not inputs:
        return
    if attention(rv, node) or experts(rv, node):
        return
    rule = item if node.target is operator.getitem else RULES.get(node.target) or LATE_RULES.get(str(node.target))
    result = rule(rv, node) if rule is not None else None
    if isinstance(result, Rows):
        rv.sparse[node] = result
    elif result is not None:
        rv.backward.add(result)
        node.replace_all_uses_with(rv.strided_like(result, node))
    else:
        for sparse in inputs:
            rv.densified[str(node.target)] += 1
            node.replace_input_with(sparse, rv.dense(sparse))


def _stop(rv: RowValues, node: Node) -> Rows:
    """A marker: the gradient on the selected rows, weighed, nothing elsewhere."""
    grad: Any = node.args[0]
    axis: Any = node.args[1]
    layout = rv.layout(*("B" if i == 0 else "S" if i == axis else None for i in range(len(shape_of(node)))))
    known = grad in rv.sparse and rv.sparse[grad].layout == layout
    values = rv.sparse[grad].values if known else rv.kept(rv.version(grad, layout), layout)
    factors = stop_factors(rv.graph)
    return Rows(values if factors is None else weighed(rv.emit, values, rv.on_slots(factors, layout, values)), layout)
