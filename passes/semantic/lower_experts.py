"""Hands the experts of Mixture-of-Experts layers to ``cggr::moe``."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from cggr_compile.passes.analysis.effects import memory, mutated_operands, overlap
from cggr_compile.passes.analysis.modes import modes_of
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.fx import Emitter, ancestors, descendants
from cggr_compile.passes.nodes import argument, fake_value, op_name
from cggr_compile.passes.patterns.experts import GROUPED, Experts, NotExpertsError, match_experts

if TYPE_CHECKING:
    from torch.fx import GraphModule


class LowerExperts(SemanticPass):
    """Replaces sort, gather, grouped products, SwiGLU and unsort by one operator. Before::

        ids, perm = sort(experts.reshape(-1))                          # experts, weights: [N, k]
        offs = cumsum(histc(ids, bins=E, min=0, max=E - 1), 0)
        gate, up = grouped_mm(hidden[perm // k], gate_up.mT, offs=offs).chunk(2, -1)
        rows = grouped_mm(silu(gate) * up, down.mT, offs=offs) * weights.reshape(-1)[perm][:, None]
        y = rows[inverse(perm)].view(N, k, H).sum(1)

    after::

        y = cggr.moe(hidden, gate_up, down, weights, experts)

    Exact but for rounding: routing weights multiply in float32. A token's output depends on that token alone, which
    the sorted form hides: only afterwards does ``find_stack`` see a residual stream. Experts with biases and the
    clamped activation of gpt-oss become ``cggr.moe_clamped``. Left alone, with the reason: other
    activations, biases without that activation, and CUDA devices or dtypes for which the operator has no kernel.
    """

    name = "lower_experts"
    optional = True

    def enabled(self, ctx: GraphContext) -> bool:
        return True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        layers: dict[Any, list[Any]] = defaultdict(list)  # the products of a layer share their offsets
        for node in gm.graph.nodes:
            if op_name(node) in GROUPED:
                layers[argument(node, 2, "offs")].append(node)
        lowered, reasons = 0, dict[str, None]()
        for products in layers.values():
            try:
                found = match_experts(products)
                _check_place(gm, found)
                _replace(gm, ctx, found)
                lowered += 1
            except NotExpertsError as why:
                reasons[str(why)] = None
        if not layers:
            return PassResult(False, "no grouped products")
        kept = "; ".join(reasons)
        if not lowered:
            return PassResult(False, f"experts stay as they are: {kept}")
        others = f"; the others stay as they are: {kept}" if kept else ""
        return PassResult(True, f"{lowered} of {len(layers)} layers of experts{others}")


def _check_place(gm: GraphModule, found: Experts) -> None:
    """The operator reads where the sum stands, and under its autocast, what its parts read from the sort on."""
    inside = descendants([found.sort], stop=[found.total]) & ancestors([found.total])
    modes = modes_of(gm.graph)
    if len({modes[node] for node in inside}) > 1:
        raise NotExpertsError("some of it runs under another grad mode or autocast")
    (gate_up, _), (down, _) = found.matrices
    operands = [found.hidden, gate_up, down, found.weights, found.experts, *(found.clamped or ())[:2]]
    read = [memory(node) for node in operands]
    nodes = list(gm.graph.nodes)
    for node in nodes[nodes.index(found.sort) : nodes.index(found.total)]:
        if any(overlap(memory(operand), own) for operand in mutated_operands(node) for own in read):
            raise NotExpertsError(f"{op_name(node)!r} ({node}) writes in place to what they are computed from")


def _replace(gm: GraphModule, ctx: GraphContext, found: Experts) -> None:
    emit = Emitter(gm.graph, ctx.fake_mode)
    dead = descendants([found.sort], stop=[found.total])
    with emit.before(found.total, LowerExperts.name):
        gate_up, down = (emit.method("transpose", m, 1, 2) if swap else m for m, swap in found.matrices)
        if found.clamped is None:
            new = emit.call(torch.ops.cggr.moe.default, found.hidden, gate_up, down, found.weights, found.experts)
        else:
            bias, other, *numbers = found.clamped
            matrices = (gate_up, bias, down, other)
            arguments = (found.hidden, *matrices, found.weights, found.experts, *numbers)
            new = emit.call(torch.ops.cggr.moe_clamped.default, *arguments)
        if fake_value(new).dtype != fake_value(found.total).dtype:
            new = emit.method("to", new, fake_value(found.total).dtype)
    new.meta = {**found.total.meta, **new.meta}
    found.total.replace_all_uses_with(new)
    for node in [n for n in reversed(gm.graph.nodes) if n in dead]:
        written = node.args[0] if node.target is operator.setitem else None
        if not node.users and (not isinstance(written, Node) or len(written.users) == 1):
            gm.graph.erase_node(node)
