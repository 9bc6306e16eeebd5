"""The forwards of a graph: what is computed from embeddings that have nothing to do with each other."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import torch

from cggr_compile.passes.analysis.uses import table_of
from cggr_compile.passes.nodes import differentiable, fake_value, op_name, shape_of
from cggr_compile.passes.patterns.loss import is_cross_entropy
from cggr_compile.passes.patterns.token_values.heads import OF_LOGITS, find_heads
from cggr_compile.passes.patterns.token_values.rules.head_values import is_head_of_values

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.fx import Graph, Node

Embeddings = frozenset["Node"]


def find_forwards(graph: Graph) -> list[Embeddings]:
    """The embeddings of every forward that a loss is computed from with gradient, in the order of their heads.

    Heads, and cross-entropies, that have an embedding in common are of one forward.
    """
    of = embeddings(graph)
    # looked at first, as heads take long to find: what reads the logits of a forward has no embedding of another one
    readers = {of[n] for n in graph.nodes if differentiable(n) and _reads_logits(n)}
    if not any(one and other and one.isdisjoint(other) for one, other in combinations(readers, 2)):
        return [frozenset().union(*readers)]
    ends = [*find_heads(graph), *(n for n in graph.nodes if is_cross_entropy(n) and differentiable(n))]
    found: list[Embeddings] = []
    for own in filter(None, (of[end] for end in ends)):
        joined = [known for known in found if not known.isdisjoint(own)]
        place = found.index(joined[0]) if joined else len(found)
        found = [known for known in found if known not in joined]
        found.insert(place, own.union(*joined))
    return found


def embeddings(graph: Graph) -> dict[Node, Embeddings]:
    """Of every node what its hidden states begin with: looked-up rows, else floats [B, S, H] that the caller gives."""
    lookups: dict[Node, Embeddings] = {}
    inputs: dict[Node, Embeddings] = {}
    for node in graph.nodes:
        is_lookup = (read := table_of(node)) is not None and _is_floating(read[0])
        is_input = node.op == "placeholder" and len(shape_of(node)) == 3 and _is_activation(node)
        for found, begins in ((lookups, is_lookup), (inputs, is_input)):
            found[node] = frozenset([node] if begins else []).union(*(found[n] for n in node.all_input_nodes))
    return {node: lookups[node] or inputs[node] for node in graph.nodes}


def mixed(several: Iterable[Embeddings]) -> bool:
    """Whether some have none in common with the others."""
    first, *others = several
    return any(one.isdisjoint(first) for one in others if one or first)


def _reads_logits(node: Node) -> bool:
    return op_name(node) in OF_LOGITS or is_cross_entropy(node) or is_head_of_values(node)


def _is_activation(node: Node) -> bool:
    return _is_floating(node) and not isinstance(fake_value(node), torch.nn.Parameter)


def _is_floating(node: Node) -> bool:
    value = fake_value(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()
