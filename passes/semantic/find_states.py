"""Finds the hidden states in front of the head where there is no stack of layers: any architecture has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cggr_compile.passes.analysis.effects import memory, mutated_operand, mutated_operands, overlap
from cggr_compile.passes.analysis.uses import table_of
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import FinalStates, LayerStack, LossSite, NoLayerStack, TokenValues
from cggr_compile.passes.fx import ancestors, descendants, in_order
from cggr_compile.passes.nodes import fake_value, op_name, same_size, shape_of
from cggr_compile.passes.patterns.head import token_slice
from cggr_compile.passes.patterns.row_wise import not_row_wise
from cggr_compile.passes.patterns.tail import tail_start

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.fx import GraphModule, Node


class FindStates(SemanticPass):
    """Records in ``ctx[FinalStates]`` what head and loss can be computed from on rows; changes nothing.

    Whatever mixes the positions (a scan, a convolution, a recurrence, attention of any kind) ends somewhere; what
    follows works on every position by itself, up to the head. In a state space model, for one::

        y = x + out_proj(scan(x) * silu(gate))    # states, [B, S, H]: two ways lead here from what was mixed
        logits = linear(norm(y), lm_head)         # tail = [norm ...]

    The walk begins at the head's input and goes up as long as everything works position by position; the states are
    the highest value [B, S, H] that everything behind is computed from. Head, loss and tail then run on the selected
    rows; the gradient of the states is that of the selected loss, exact, and so is everything below.
    """

    name = "find_states"
    needs = (LossSite,)
    uses = (LayerStack, NoLayerStack, TokenValues)
    provides = (FinalStates,)
    analysis = True

    def enabled(self, ctx: GraphContext) -> bool:
        return True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        found = _find(gm, ctx[LossSite]) if ctx.level != "routed" and _predicts_tokens(gm, ctx) else None
        if found is not None:
            ctx.add(found)
        elif ctx.level == "routed":
            return PassResult(False, "the last block's output: there is a stack of layers")
        else:
            return ctx[NoLayerStack].refusal
        details = {"states": str(found.states), "shape": [str(size) for size in shape_of(found.states)]}
        return PassResult(True, f"hidden states {found.states}, {len(found.tail)} operations before the head", details)


def _predicts_tokens(gm: GraphModule, ctx: GraphContext) -> bool:
    """Whether the head is one: in a piece of a model the gate of a router looks the same, and its values leave it.

    It is where there are labels, or where tokens of as many kinds are looked up.
    """
    values, vocab = ctx.get(TokenValues), ctx[LossSite].vocab
    if values is None or values.labels is not None:
        return True
    tables = (read[0] for node in gm.graph.nodes if (read := table_of(node)) is not None)
    return any(same_size(shape_of(table)[0], vocab) for table in tables)


def _find(gm: GraphModule, site: LossSite) -> FinalStates | None:
    stream = _stream(gm, site.hidden)
    found = None
    for states, tail in _candidates(gm, site.hidden, stream):
        start = tail_start(tail, states)
        if not isinstance(start, str) and not _written_later(gm, states, (*tail, *site.chain)):
            found = FinalStates(states, tail, start, stream)
    return found


def _stream(gm: GraphModule, hidden: Node) -> frozenset[Node]:
    """What is computed of the batch, not of weights alone, and goes into the head."""
    reaching = ancestors([hidden])
    data = [n for n in gm.graph.nodes if n in reaching and n.op in ("placeholder", "get_attr") and _is_data(n)]
    return frozenset(n for n in descendants(data) & reaching if _is_floating(n))


def _is_data(node: Node) -> bool:
    value = fake_value(node)
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
        return False
    return not value.requires_grad or value.dim() > 2  # a weight that is no Parameter; a caller's embeddings


def _is_floating(node: Node) -> bool:
    value = fake_value(node)
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(t, torch.Tensor) and t.is_floating_point() for t in tensors)


def _candidates(gm: GraphModule, hidden: Node, stream: frozenset[Node]) -> Iterator[tuple[Node, tuple[Node, ...]]]:
    """Values [B, S, H] that the head's input is computed from, by position-wise calls; from below, with these calls."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    tail: set[Node] = set()
    reads = {hidden} & stream
    while reads:
        node = max(reads, key=order.__getitem__)
        if len(reads) == 1 and len(shape_of(node)) == 3:
            yield node, tuple(in_order(gm.graph, tail))
        sources = stream.intersection(node.all_input_nodes)
        if not sources or not _position_wise(node, stream):
            return
        tail.add(node)
        reads = reads - {node} | sources


def _position_wise(node: Node, stream: frozenset[Node]) -> bool:
    sliced = op_name(node) == "getitem" and len(shape_of(node.all_input_nodes[0])) == 3
    if sliced and token_slice(node) is not None:
        return True
    return mutated_operand(node) is None and not not_row_wise(node, stream)


def _written_later(gm: GraphModule, states: Node, copied: tuple[Node, ...]) -> bool:
    """Whether something behind the states writes to them, or to what is copied for rows: that would not be."""
    ours = [memory(node) for node in (states, *copied)]
    behind = False
    for node in gm.graph.nodes:
        written = [memory(target) for target in mutated_operands(node)] if behind else []
        if any(overlap(one, other) for one in written for other in ours):
            return True
        behind = behind or node is states
    return False
