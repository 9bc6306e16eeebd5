"""Where a graph computes the entropy of every token's final distribution, if rows can be selected behind that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cggr_compile.passes.analysis.modes import modes_of
from cggr_compile.passes.base import GraphContext
from cggr_compile.passes.facts import FinalStates, TokenValues
from cggr_compile.passes.patterns.token_values.layout import Layout
from cggr_compile.passes.patterns.token_values.rules.head_values import is_head_of_values

if TYPE_CHECKING:
    from torch.fx import Graph, Node

# Its place among the results of ``cggr::token_log_probs``.
ENTROPY = 1


@dataclass(frozen=True)
class FinalEntropy:
    """The only call of ``cggr::token_log_probs``, and which positions its results have."""

    call: Node
    layout: Layout


def final_entropy(graph: Graph, ctx: GraphContext) -> FinalEntropy | str:
    """The entropies, or why there are none that rows could be selected by."""
    values = ctx.get(TokenValues)
    if values is None:
        return "the loss is one cross-entropy, whose gradient is taken before the entropies are known"
    if len(values.heads) != 1 or not is_head_of_values(values.heads[0]):
        return "the entropies are not those of one call of cggr_compile.token_log_probs, or of what is lowered to one"
    (call,) = values.heads
    modes = modes_of(graph)
    nodes = [*ctx[FinalStates].tail, call.next]
    if any(modes[node].levels or not modes[node].records for node in nodes):
        return "the head runs without gradient, in inference mode or under torch.vmap"
    return FinalEntropy(call, values.head_layouts[0])
