"""Where the documents of a packed sequence begin, as a graph tells: its positions, and what attention may see."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cggr_compile import compat
from cggr_compile.passes.base import GraphContext
from cggr_compile.passes.facts import Candidates, FinalStates, Forward, LayerStack, LossSite, Padding
from cggr_compile.passes.fx import Emitter, ancestors
from cggr_compile.passes.nodes import fake_value, op_name, same_size, shape_of
from cggr_compile.passes.patterns.attention import hidden_by
from cggr_compile.passes.patterns.attention.base import Hides

if TYPE_CHECKING:
    from torch.fx import Graph, Node

# what makes rotary embeddings of positions
_ROTARY = ("cos", "sin", "polar")


@dataclass(frozen=True)
class Documents:
    """How the graph tells documents apart.

    Attributes:
        positions: integers [B or 1, S] that count up by one inside a document.
        hides: what attention hides, where all attentions hide something that can be read: a document begins where no
            query may see the key just before its own.
        unread: why an attention may tell documents apart in a way that cannot be read; empty if none does.
    """

    positions: tuple[Node, ...]
    hides: tuple[Hides, ...]
    unread: str

    @property
    def names(self) -> list[str]:
        """The nodes that tell it."""
        return list(dict.fromkeys(str(n) for n in (*self.positions, *(n for h in self.hides for n in h.inputs))))

    def starts(self, emit: Emitter) -> Node | None:
        """bool [B or 1, S], True where a document begins (any value at 0); None: a sequence is one document."""
        found = [_not_counted(emit, positions) for positions in self.positions]
        seen = [hides.previous(emit) for hides in self.hides]
        for other in seen[1:]:
            seen[0] = emit.call(operator.or_, seen[0], other)
        found += [emit.call(torch.logical_not, node) for node in seen[:1]]
        for other in found[1:]:
            found[0] = emit.call(operator.or_, found[0], other)
        return found[0] if found else None


def documents(graph: Graph, ctx: GraphContext) -> Documents:
    """How ``graph`` tells documents apart, by what is computed in front of the selection."""
    anchor, stream = ctx[Candidates].anchor, ctx[FinalStates].stream
    positions = tuple(node for node in graph.find_nodes(op="placeholder") if _counts_tokens(node, ctx))
    found = [hidden_by(attention, stream) for attention in ctx[LayerStack].attentions]
    if any(hides is None for hides in found):
        return Documents(positions, (), "")
    unread = "; ".join(dict.fromkeys(hides for hides in found if isinstance(hides, str)))
    if unread:
        return Documents(positions, (), unread)
    # a mask that is made in a later block is one more that hides the same
    there = (h for h in found if isinstance(h, Hides) and all(node < anchor for node in h.inputs))
    return Documents(positions, tuple(dict.fromkeys(there)), "")


def real_tokens(graph: Graph, ctx: GraphContext) -> Node | None:
    """The graph input [B, S] that is zero at padding."""
    padding = ctx.get(Padding)
    if padding is not None and padding.mask is not None:
        return padding.mask
    inputs = [node for node in graph.find_nodes(op="placeholder") if _called(node, "attention_mask")]
    # one of floats may be added to scores: zero at real tokens
    return next((n for n in inputs if _per_token(n, ctx) and not fake_value(n).is_floating_point()), None)


def _counts_tokens(node: Node, ctx: GraphContext) -> bool:
    """Whether a graph input holds positions in documents: by its name, or as what a rotary embedding is made of."""
    if not _per_token(node, ctx) or fake_value(node).is_floating_point() or fake_value(node).dtype == torch.bool:
        return False
    return _called(node, "position_ids") or _is_rotated(node, ctx)


def _is_rotated(node: Node, ctx: GraphContext) -> bool:
    todo, found, stream = [node], {node}, ctx[FinalStates].stream
    while todo:
        for user in todo.pop().users:
            if op_name(user) in _ROTARY:
                return True
            if user not in found and user not in stream:
                found.add(user)
                todo.append(user)
    return False


def _per_token(node: Node, ctx: GraphContext) -> bool:
    """Whether an input has an entry for every position of the stream: [B or 1, S]."""
    shape, stream = shape_of(node), shape_of(ctx[FinalStates].states)
    if ctx.get(Forward) is not None and node not in ancestors([ctx[LossSite].hidden, ctx[Candidates].valid]):
        return False  # it may be another forward's
    if len(shape) != 2 or not same_size(shape[1], stream[1]) or fake_value(node).requires_grad:
        return False
    return same_size(shape[0], stream[0]) or same_size(shape[0], 1)


def _called(node: Node, name: str) -> bool:
    return re.search(rf"\b{name}\b['\"]?\]?$", compat.source_path(node) or "") is not None


def _not_counted(emit: Emitter, positions: Node) -> Node:
    """Where an entry is not one more than that before it: bool [B or 1, S], False at 0."""
    after, before = ((..., slice(1, None)), (..., slice(None, -1)))
    step = emit.call(operator.sub, *(emit.call(operator.getitem, positions, part) for part in (after, before)))
    return emit.call(torch.nn.functional.pad, emit.call(operator.ne, step, 1), (1, 0), "constant", False)
