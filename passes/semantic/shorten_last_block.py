"""Finds how much of the last block nothing reads but the rows of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cggr_compile.passes.analysis.effects import mutated_operand
from cggr_compile.passes.analysis.modes import has_effect, modes_of
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import Candidates, FinalStates, LayerStack, LossSite, Outputs, RowTail, TokenValues
from cggr_compile.passes.fx import ancestors, descendants, in_order
from cggr_compile.passes.nodes import fake_value, op_name, same_size, shape_of
from cggr_compile.passes.patterns.head import returned_logits
from cggr_compile.passes.patterns.row_wise import WEIGHTED, not_row_wise

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


class ShortenLastBlock(SemanticPass):
    """Lets the rows of the loss be gathered inside the last block, behind what mixes. ``rewrite_loss`` then makes::

        y = x + o_proj(attention(...)); z = y + mlp(norm(y)); h = cggr.gather_rows(z, rows, keep)

    into::

        a = cggr.gather_rows(attention(...), rows, keep); b = cggr.gather_rows(x, rows, keep)       # [B, K, H]
        y = b + o_proj(a); h = y + mlp(norm(y))

    Without the logits nothing else reads the last block's output: its output projection and MLP, which work on every
    position by itself, run on those rows only. Keys, values and the attention itself stay whole. The numbers are
    the same, apart from the rounding of products of another size.
    """

    name = "shorten_last_block"
    level = "routed"
    needs = (LossSite, LayerStack, FinalStates, Outputs, Candidates)
    uses = (TokenValues,)
    provides = (RowTail,)
    analysis = True
    optional = True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        if ctx.get(TokenValues) is not None:
            return PassResult(False, "the last block is computed for every position: per-token values are exact at all")
        nodes, entries, obstacle = _row_wise_part(ctx[LayerStack])
        obstacle = obstacle or _other_reader(gm, ctx, nodes) or _too_early(gm, ctx[Candidates], nodes)
        if obstacle:
            return PassResult(False, f"the last block is computed for every position: {obstacle}")
        ordered = in_order(gm.graph, nodes)
        ctx.add(RowTail(tuple(in_order(gm.graph, entries)), tuple(ordered)))
        listed = ", ".join(map(str, ctx[RowTail].entries))
        return PassResult(True, f"{len(ordered)} operations of the last block on rows, behind {listed}")


def _row_wise_part(stack: LayerStack) -> tuple[set[Node], set[Node], str]:
    """The calls behind what mixes positions up to the block's output, what they take rows of, or why there are none."""
    block = stack.blocks[-1]
    batch, length, _ = shape_of(block.output)
    carried = descendants([stack.source])  # which experts a token goes to, for one, has no gradient
    before = ancestors(block.mixing)
    nodes: set[Node] = set()
    entries: set[Node] = set()
    todo = [block.output]
    while todo:
        node = todo.pop()
        if node in nodes or node in entries:
            continue
        streams = {source for source in node.all_input_nodes if source in carried}
        why = "it mixes positions" if node in before else not_row_wise(node, streams) or _misshapen(node, batch, length)
        if not why and mutated_operand(node) is None:
            nodes.add(node)
            todo.extend(streams)
        elif len(shape_of(node)) == 3 and _misshapen(node, batch, length) == "":
            entries.add(node)
        else:
            return set(), set(), why or f"{op_name(node)!r} ({node}) writes in place"
    saved = any(op_name(node) in WEIGHTED for node in nodes)
    return nodes, entries, "" if saved else "no product of it works on every position by itself"


def _misshapen(node: Node, batch: Any, length: Any) -> str:
    """Why a value has no row per position, [B, S, X] or [B * S, X]; empty if it has."""
    value = fake_value(node)
    for shape in [tuple(part.shape) for part in (value if isinstance(value, (tuple, list)) else [value])]:
        whole = len(shape) == 3 and same_size(shape[0], batch) and same_size(shape[1], length)
        if not whole and not (len(shape) == 2 and same_size(shape[0], batch * length)):
            return f"{node} has the shape {list(shape)}"
    return ""


def _other_reader(gm: GraphModule, ctx: GraphContext, nodes: set[Node]) -> str:
    """What else reads these calls, or the tail and the logits behind them; empty if nothing does."""
    final, loss, kinds = ctx[FinalStates], ctx[LossSite], ctx[Outputs].kinds
    results: Any = gm.graph.output_node().args[0]
    dropped = {
        results[i]
        for i, kind in kinds.items()
        if kind == "logits" and ctx.options.logits == "drop" and same_size(shape_of(results[i])[-1], loss.vocab)
    }
    closed = {*nodes, *final.tail, *loss.chain, *returned_logits(loss), loss.loss}
    # what an earlier pass has replaced is still there
    alive = ancestors(n for n in gm.graph.nodes if has_effect(n))
    for node in closed - {loss.loss}:
        for user in node.users:
            if user in alive and user not in closed and not (user.op == "output" and node in dropped):
                return f"{'the caller' if user.op == 'output' else user} reads {node}"
    return ""


def _too_early(gm: GraphModule, candidates: Candidates, nodes: set[Node]) -> str:
    """Whether rows are not known yet where these calls stand, or cannot be taken there."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    modes = modes_of(gm.graph)
    if any(order[node] < order[candidates.anchor] for node in nodes):
        return "the rows are selected behind it"
    if any(modes[node].levels or modes[node].inference for node in nodes):
        return "it runs in inference mode or under torch.vmap"
    return ""
