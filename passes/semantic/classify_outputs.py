"""Tells what each differentiable result of the graph is, and what has to be differentiated at every position for it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Any

from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import (
    Block,
    FinalStates,
    Forward,
    LayerStack,
    LossSite,
    OutputKind,
    Outputs,
    TokenValues,
)
from cggr_compile.passes.fx import ancestors, descendants, in_order, layout_only
from cggr_compile.passes.nodes import argument, differentiable, module_of, op_name, shape_of
from cggr_compile.passes.patterns.experts import GROUPED
from cggr_compile.passes.patterns.head import CASTS, returned_logits
from cggr_compile.passes.patterns.mixer_states import mixer_states
from cggr_compile.passes.semantic.route_gradient import PRODUCTS

if TYPE_CHECKING:
    from torch.fx import Graph, GraphModule, Node

_EXPERTS = (*GROUPED, "moe.default", "moe_clamped.default", "moe_mlp.default")
_LAYOUT = {"getitem", "narrow", "view", "reshape", "transpose", "permute", "swapaxes", "unsqueeze", "squeeze"} | {
    *("cat", "stack", *CASTS)
}
_NAMED = 3  # outputs that a warning names


class ClassifyOutputs(SemanticPass):
    """Records in ``ctx[Outputs]`` what each differentiable result is; changes nothing.

    In ``return (loss, aux_loss, logits, key, value, hidden)``, where ``loss = cross_entropy(...) + aux_loss``:

    - ``loss``: what the cross-entropy is a part of, of any shape;
    - ``value``: several numbers computed from per-token values, of which the caller computes the loss;
    - ``part``: one number that the loss adds, or the logits of a router whose balance loss it adds: their gradient
      takes the loss's way;
    - ``logits``: the logits of the cross-entropy, perhaps cast, sliced or reshaped;
    - ``cache``: the keys of an attention, [B, heads, S, D], that are returned with its values, and these; the states of
      a token mixer, written into tensors that are returned;
    - ``kept``: everything else. It keeps its exact gradient, so nothing may be stopped between it and a parameter. The
      blocks on the way are differentiated at every position, and a warning names them.
    """

    name = "classify_outputs"
    needs = (LossSite, FinalStates)
    uses = (LayerStack, Forward, TokenValues)
    provides = (Outputs,)
    analysis = True

    def enabled(self, ctx: GraphContext) -> bool:
        return True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        results: Any = gm.graph.output_node().args[0]
        found = {i: node for i, node in enumerate(results) if hasattr(node, "meta") and differentiable(node)}
        if (forward := ctx.get(Forward)) is not None:  # what is computed from another one alone is that one's
            elsewhere = descendants(forward.others) - descendants(forward.embeddings)
            found = {i: node for i, node in found.items() if node not in elsewhere}
        stack = ctx.get(LayerStack)
        blocks = stack.blocks if stack is not None else ()
        kinds = _kinds(gm.graph, found, ctx[LossSite], ctx[FinalStates].stream, blocks)
        kept = list(dict.fromkeys(found[i] for i, kind in kinds.items() if kind == "kept"))
        dense = _between(kept, blocks)
        inside = [node for i, node in found.items() if kinds[i] in ("loss", "value", "part", "kept")]
        read = ancestors(inside, ctx[LossSite].ends)
        every_position = any(node in read for block in blocks for node in block.mixing)
        values = ctx.get(TokenValues)
        every_position = every_position or (values is not None and values.everywhere)
        wanted = "loss" if "loss" in kinds.values() else "value"
        objective = [i for i, kind in kinds.items() if kind == wanted or (kind == "kept" and _is_one_number(found[i]))]
        ctx.add(Outputs(kinds, tuple(objective), frozenset(dense), every_position))
        details: dict[str, Any] = {kind: [str(found[i]) for i in kinds if kinds[i] == kind] for kind in kinds.values()}
        if not kept:
            return PassResult(False, "no output but the loss keeps a gradient", details)
        names = [block.name for i, block in enumerate(blocks) if i in dense]
        details["dense_blocks"] = names
        reason = f"{_described(kept)} {'keeps its' if len(kept) == 1 else 'keep their'} exact gradient"
        if names:
            where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            reason += (
                f": the backward of {where} ({len(names)} of {len(blocks)} blocks) computes every position, "
                "and no gradient is stopped there"
            )
            ctx.warnings.append(f"{reason}. Where no loss is computed from such an output, return it with .detach()")
        return PassResult(True, reason, details)


def _kinds(
    graph: Graph, found: dict[int, Node], loss: LossSite, stream: Set[Node], blocks: Sequence[Block]
) -> dict[int, OutputKind]:
    returned = list(dict.fromkeys(found.values()))
    with_loss = descendants(loss.ends, only=differentiable)
    losses = with_loss.intersection(returned)
    logits = returned_logits(loss)
    cache = _cache(graph, blocks, returned).union(mixer_states(graph, blocks))
    ends = [block.output for block in blocks]
    sizes = {shape_of(argument(node, 1, "weight"))[0] for node in graph.nodes if op_name(node) in _EXPERTS}

    def is_part(node: Node) -> bool:
        shape = shape_of(node)
        if _is_one_number(node):
            stops = [*loss.ends, *(n for n in stream if n is not node)]
        elif len(shape) in (1, 2) and shape[-1] in sizes:
            stops = [*loss.ends, *ends]
        else:
            return False
        return not losses.isdisjoint(descendants([node], stops, differentiable) - set(stops))

    def kind(node: Node) -> OutputKind:
        if node in with_loss:
            return "value" if loss.values and not _is_one_number(node) else "loss"
        if node in logits:
            return "logits"
        if node in cache:
            return "cache"
        return "part" if is_part(node) else "kept"

    known = {node: kind(node) for node in returned}
    return {i: known[node] for i, node in found.items()}


def _is_one_number(node: Node) -> bool:
    return all(isinstance(size, int) and size == 1 for size in shape_of(node))


def _cache(graph: Graph, blocks: Sequence[Block], returned: Sequence[Node]) -> set[Node]:
    """Those of ``returned`` that are keys and values of attentions, in any layout, where both are returned."""
    sides: dict[Node, set[tuple[int, str]]] = {}
    every = [(block.input, attention) for block in blocks for attention in block.attentions]
    for index, (start, attention) in enumerate(every):
        for side, end in (("key", attention.key), ("value", attention.value)):
            path = descendants([start], stop=[end]) & ancestors([end])
            projected = descendants([n for n in path if op_name(n) in PRODUCTS], stop=[end]) & path
            for node in projected:
                if len(shape_of(node)) == 4:
                    sides.setdefault(node, set()).add((index, side))
    for node in in_order(graph, descendants(sides)):
        if node not in sides and (op_name(node) in _LAYOUT or layout_only(node)):
            sources = [n for n in node.all_input_nodes if differentiable(n)]
            if sources and all(source in sides for source in sources):
                sides[node] = set().union(*(sides[source] for source in sources))
    there = set().union(*(sides.get(node, set()) for node in returned)) if returned else set()
    whole = {index for index, _ in there if {(index, "key"), (index, "value")} <= there}
    return {node for node in returned if node in sides and {index for index, _ in sides[node]} <= whole}


def _between(kept: Sequence[Node], blocks: Sequence[Block]) -> list[int]:
    """The blocks inside of which a way leads from a kept output back to a parameter."""
    before = ancestors(kept, only=differentiable)
    found = []
    for i, block in enumerate(blocks):
        inside = descendants([block.input], stop=[block.output]) & ancestors([block.output])
        if before & (inside - {block.input}):
            found.append(i)
    return found


def _described(nodes: Sequence[Node]) -> str:
    named = [
        f"{node} {list(shape_of(node))}" + (f" of {place}" if (place := module_of(node)) else "")
        for node in nodes[:_NAMED]
    ]
    rest = len(nodes) - len(named)
    return f"output {', '.join(named)}" + (f" and {rest} more" if rest else "")
