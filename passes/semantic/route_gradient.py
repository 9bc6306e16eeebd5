"""Gradient routing: no gradient flows into the residual stream of unselected positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import (
    Block,
    Candidates,
    FinalStates,
    GradientRows,
    LayerStack,
    Outputs,
    Routing,
    Selection,
)
from cggr_compile.passes.fx import Emitter, ancestors, bottlenecks, descendants, in_order
from cggr_compile.passes.nodes import op_name, same_size, shape_of
from cggr_compile.passes.patterns.token_mixers import token_mixers

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

PRODUCTS = {"linear", "matmul", "addmm", "bmm", "baddbmm", "einsum", "conv1d", "gemm_4bit.default"}


class RouteGradient(SemanticPass):
    """Marks, at every attention, where the gradient of unselected positions ends.

    Before::

        attention(q_proj(x), k_proj(x), v_proj(x))

    After, with ``kv_gradient="stop"``::

        attention(q_proj(x), cggr.detach_unselected(k_proj(x), 2), cggr.detach_unselected(v_proj(x), 2))

    and with ``kv_gradient="project"``, where the projections' weights still learn from every position::

        y = cggr.detach_unselected(x, 1)
        attention(q_proj(x), k_proj(y), v_proj(y))

    A fused projection takes its whole input from ``y``: the query gradient of an unselected position is zero
    anyway. The marker names no rows, because early blocks run before the selection exists; a pass over the
    joint graph (``resolve_markers``) gives it them, and with ``kv_weight="1/sqrt(p)"`` the factors, from::

        h = cggr.gather_rows(x, cggr.scale_selected_grads(rows, weights.sqrt()), keep)
    """

    name = "route_gradient"
    level = "routed"
    needs = (LayerStack, FinalStates, Outputs, Candidates, Routing, Selection)

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        if ctx[Routing].gradient == "exact":
            return PassResult(False, "gradient='exact' stops nothing")
        emit = Emitter(gm.graph, ctx.fake_mode)
        stopped = [i for i in range(len(ctx[LayerStack].blocks)) if i not in ctx[Outputs].dense_blocks]
        if not stopped:
            return PassResult(False, "outputs that keep their exact gradient are behind every block")
        for block in (ctx[LayerStack].blocks[i] for i in stopped):
            if ctx.options.kv_gradient == "stop":
                self._stop_keys_and_values(emit, block)
            else:
                self._stop_projection_input(emit, block, ctx)
        how = f"kv_gradient={ctx.options.kv_gradient!r}"
        if ctx.options.kv_weight != "1":
            self._weigh(emit, ctx)
            how += f", kv_weight={ctx.options.kv_weight!r}"
        how += f" at {len(stopped)} attentions"
        markers = gm.graph.find_nodes(op="call_function", target=torch.ops.cggr.detach_unselected.default)
        mixers = token_mixers(ctx[LayerStack], ctx[FinalStates].stream, markers, stopped)
        if not mixers:
            return PassResult(True, how)
        names = ", ".join(dict.fromkeys(map(op_name, mixers)))
        modules = list(dict.fromkeys(mixers.values()))
        where = f"{modules[0]} and {len(modules) - 1} more" if len(modules) > 1 else modules[0]
        leak = f"no gradient is stopped where tokens are mixed without attention: {names} in {where}"
        ctx.notices.append(f"{leak}. Unselected positions get a gradient there, under gradient='routed' as well")
        return PassResult(True, f"{how}; {leak}", {"mixers": {str(n): place for n, place in mixers.items()}})

    def _weigh(self, emit: Emitter, ctx: GraphContext) -> None:
        rows, gradient = ctx[Selection].rows, ctx[Selection].gradient
        own = rows if gradient is None else gradient.rows
        every = emit.graph.find_nodes(op="call_function", target=torch.ops.cggr.gather_rows.default)
        gathers = [gather for gather in every if own in gather.all_input_nodes]
        with emit.before(gathers[0], self.name):
            factors = emit.method("sqrt", ctx[Selection].weights)  # a token's weight is 1/p
            if gradient is not None:
                factors = _spread(emit, ctx[Selection], gradient, ctx[Candidates].valid, factors)
                rows = gradient.rows
            weighed = emit.call(torch.ops.cggr.scale_selected_grads.default, rows, factors)
        for gather in gathers:
            gather.replace_input_with(rows, weighed)

    def _stop_keys_and_values(self, emit: Emitter, block: Block) -> None:
        attention = block.attention
        keys = (attention.key, attention.key_user, attention.key_dim)
        values = (attention.value, attention.value_user, attention.value_dim)
        for tensor, user, axis in dict.fromkeys((keys, values)):  # some models share one tensor
            with emit.before(tensor.next, self.name):
                marked = emit.call(torch.ops.cggr.detach_unselected.default, tensor, axis)
            user.replace_input_with(tensor, marked)

    def _stop_projection_input(self, emit: Emitter, block: Block, ctx: GraphContext) -> None:
        goal = {block.attention.key, block.attention.value}
        paths = descendants([block.input], stop=goal) & ancestors(goal) & ctx[FinalStates].stream
        source = _projection_input(in_order(emit.graph, paths), block)
        with emit.before(source.next, self.name):
            marked = emit.call(torch.ops.cggr.detach_unselected.default, source, 1)
        for user in [u for u in source.users if u in paths]:
            user.replace_input_with(source, marked)


def _spread(emit: Emitter, selection: Selection, gradient: GradientRows, valid: Node, factors: Node) -> Node:
    """The factors of the selected rows, [B, K], for all that carry gradient, [B, G].

    1 for those that always do, selected or not, and for the context of a selected row, which is not drawn by itself.
    """
    used = emit.call(torch.where, selection.keep, factors, 1.0)
    each = emit.method("scatter", emit.call(torch.ones_like, valid, dtype=torch.float32), 1, selection.rows, used)
    if gradient.extra is not None:
        each = emit.call(torch.where, gradient.extra, 1.0, each)
    return emit.method("gather", each, 1, gradient.rows)


def _projection_input(ordered: list[Node], block: Block) -> Node:
    """The last node [B, S, *] that all of the block's keys and values come through before any product."""
    shape = shape_of(block.input)
    before_products = ordered
    for i, node in enumerate(ordered):
        if op_name(node) in PRODUCTS:
            before_products = ordered[:i]
            break
    through = set(bottlenecks(ordered))
    found = block.input
    for node in before_products:
        candidate = shape_of(node)
        if node in through and len(candidate) == 3 and all(map(same_size, candidate[:2], shape[:2])):
            found = node
    return found
