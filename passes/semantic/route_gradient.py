"""Gradient routing: no gradient flows into the residual stream of unselected positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import (
    Attention,
    Block,
    Candidates,
    FinalStates,
    GradientRows,
    LayerStack,
    Mixer,
    Outputs,
    Routing,
    Selection,
)
from cggr_compile.passes.fx import Emitter, ancestors, bottlenecks, descendants, in_order, place_behind
from cggr_compile.passes.nodes import fake_value, op_name, same_size, shape_of
from cggr_compile.passes.patterns.row_wise import not_row_wise
from cggr_compile.passes.patterns.token_mixers import token_mixers

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

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
    anyway.

    A token mixer that is no attention gets the same gates: its backward spreads the gradient of its output to other
    positions, inside of it, and it ends where the mixer was fed. With ``project`` that is the input of its
    projections; with ``stop`` what they give::

        out_proj(scan(conv(cggr.detach_unselected(in_proj(x), 1))) * silu(gate_proj(x)))

    What comes to a mixing past the block's input, as the embedding in every layer, has a gate of its own. What works on
    positions by itself, behind the last mixing, needs none. The marker names no rows, because early
    blocks run before the selection exists; a pass over the joint graph (``resolve_markers``) gives it them, and with
    ``kv_weight="1/sqrt(p)"`` the factors, from::

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
        blocks = [ctx[LayerStack].blocks[i] for i in stopped]
        for block in blocks:
            if ctx.options.kv_gradient == "project":
                self._stop_projection_input(emit, block, ctx)
                continue
            if block.mixer is not None:
                self._stop_projected(emit, block, block.mixer, ctx)
            self._stop_keys_and_values(emit, block.attentions)
        how = f"kv_gradient={ctx.options.kv_gradient!r}"
        if ctx.options.kv_weight != "1":
            self._weigh(emit, ctx)
            how += f", kv_weight={ctx.options.kv_weight!r}"
        how += f" at {sum(len(block.attentions) for block in blocks)} attentions"
        gated = {b.name: f"{b.mixer.kind}: gated, dense backward" for b in blocks if b.mixer is not None}
        for what in dict.fromkeys(gated.values()):
            how += f"; {what}, in {', '.join(name for name, said in gated.items() if said == what)}"
        details = {"gated": gated} if gated else {}
        markers = gm.graph.find_nodes(op="call_function", target=torch.ops.cggr.detach_unselected.default)
        mixers = token_mixers(ctx[LayerStack], ctx[FinalStates].stream, markers, stopped)
        if not mixers:
            return PassResult(True, how, details)
        names = ", ".join(dict.fromkeys(map(op_name, mixers)))
        modules = list(dict.fromkeys(mixers.values()))
        where = f"{modules[0]} and {len(modules) - 1} more" if len(modules) > 1 else modules[0]
        leak = f"no gradient is stopped where tokens are mixed without attention: {names} in {where}"
        ctx.notices.append(f"{leak}. Unselected positions get a gradient there, under gradient='routed' as well")
        return PassResult(True, f"{how}; {leak}", {**details, "mixers": {str(n): p for n, p in mixers.items()}})

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

    def _stop_keys_and_values(self, emit: Emitter, attentions: Iterable[Attention]) -> None:
        readers: dict[tuple[Node, int], dict[Node, None]] = {}  # some models share one tensor
        for one in attentions:
            readers.setdefault((one.key, one.key_dim), {})[one.key_user] = None
            readers.setdefault((one.value, one.value_dim), {})[one.value_user] = None
        for (tensor, axis), users in readers.items():
            self._mark(emit, tensor, users, axis)

    def _stop_projection_input(self, emit: Emitter, block: Block, ctx: GraphContext) -> None:
        behind, stream = descendants([block.input]), ctx[FinalStates].stream
        foreign = [a for a in block.attentions if a.key not in behind and a.value not in behind]
        goal = {node for a in block.attentions if a not in foreign for node in (a.key, a.value)}
        goal |= set() if block.mixer is None else {*block.mixer.nodes}
        self._stop_keys_and_values(emit, [a for a in foreign if not _is_gated(a, ctx[LayerStack])])
        if not goal:
            return
        paths = descendants([block.input], stop=goal) & ancestors(goal) & stream
        source = _projection_input(in_order(emit.graph, paths), block, goal)
        self._mark(emit, source, [u for u in source.users if u in paths])
        for other, readers in _past(block, descendants([source]) & paths, stream - behind).items():
            self._mark(emit, other, readers)

    def _stop_projected(self, emit: Emitter, block: Block, mixer: Mixer, ctx: GraphContext) -> None:
        """Mark what the last projections on the way to the mixer give, or the mixer's input where there are none.

        Of projections there are as many as compute every position by itself, one behind the other.
        """
        stream, goal = ctx[FinalStates].stream, {*mixer.nodes}
        paths = descendants([block.input]) & ancestors(goal) & stream
        ordered = in_order(emit.graph, paths)
        first = _projection_input(ordered, block, goal)
        past = _past(block, paths, stream - descendants([block.input]))
        by_itself = {block.input, *past}
        for node in ordered:
            sources = [n for n in node.all_input_nodes if n in stream]
            if node not in goal and sources and by_itself.issuperset(sources) and _on_rows(node, block, stream):
                by_itself.add(node)
        mixed = paths - by_itself  # and what leads there without a further projection
        for node in [n for n in reversed(ordered) if n in by_itself]:
            readers = [user for user in node.users if user in mixed]
            if readers and (node is first or op_name(node) in PRODUCTS):
                self._mark(emit, node, readers)
            elif readers:
                mixed.add(node)
        for other, users in past.items():
            if readers := [user for user in users if user in mixed]:
                self._mark(emit, other, readers)

    def _mark(self, emit: Emitter, source: Node, readers: Iterable[Node], axis: int = 1) -> None:
        with emit.before(place_behind(source), self.name):
            marked = emit.call(torch.ops.cggr.detach_unselected.default, source, axis)
        for reader in readers:
            reader.replace_input_with(source, marked)


def _spread(emit: Emitter, selection: Selection, gradient: GradientRows, valid: Node, factors: Node) -> Node:
    """The factors of the selected rows, [B, K], for all that carry gradient, [B, G].

    1 for those that always do, selected or not, and for the context of a selected row, which is not drawn by itself.
    """
    used = emit.call(torch.where, selection.keep, factors, 1.0)
    each = emit.method("scatter", emit.call(torch.ones_like, valid, dtype=torch.float32), 1, selection.rows, used)
    if gradient.extra is not None:
        each = emit.call(torch.where, gradient.extra, 1.0, each)
    return emit.method("gather", each, 1, gradient.rows)


def _is_gated(attention: Attention, stack: LayerStack) -> bool:
    """Whether keys and values are computed of what has its gate already: they are those of an earlier layer."""
    markers = attention.node.graph.find_nodes(
        op="call_function", target=torch.ops.cggr.detach_unselected.default, sort=False
    )
    fed = ancestors([attention.key, attention.value], stop=markers)
    return fed.isdisjoint(block.input for block in stack.blocks)


def _past(block: Block, paths: Container[Node], outside: Iterable[Node]) -> dict[Node, list[Node]]:
    """What comes past the block's input, [B, S, ...]; with its readers in ``paths``."""
    sizes = shape_of(block.input)[:2]
    found: dict[Node, list[Node]] = {}
    for node in outside:
        readers = [user for user in node.users if user in paths]
        if readers and len(shape_of(node)) >= 3 and all(map(same_size, shape_of(node), sizes)):
            found[node] = readers
    return found


def _on_rows(node: Node, block: Block, stream: Container[Node]) -> bool:
    """Whether a call computes the rows [B, S, ...] of those that it is given."""
    batch, length, _ = shape_of(block.input)
    value = fake_value(node)
    for part in value if isinstance(value, (tuple, list)) else (value,):
        shape = tuple(part.shape)
        if len(shape) < 3 or not same_size(shape[0], batch) or not same_size(shape[1], length):
            return False
    return not not_row_wise(node, stream)


def _projection_input(ordered: list[Node], block: Block, goal: Container[Node]) -> Node:
    """The last node [B, S, *] that all which mixes positions comes through before any product, or any mixing."""
    shape = shape_of(block.input)
    before_products = ordered
    for i, node in enumerate(ordered):
        if op_name(node) in PRODUCTS or (node in goal and node is not block.input):
            before_products = ordered[:i]
            break
    through = set(bottlenecks(ordered))
    found = block.input
    for node in before_products:
        candidate = shape_of(node)
        if node in through and len(candidate) == 3 and all(map(same_size, candidate[:2], shape[:2])):
            found = node
    return found
