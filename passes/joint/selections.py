"""The selections of a joint graph: one for each forward that trains on selected positions."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cggr_compile.passes.fx import descendants

if TYPE_CHECKING:
    from torch.fx import Graph, Node

ops = torch.ops.cggr


@dataclass(frozen=True)
class JointSelection:
    """Rows that carry gradient, and what is computed from their gradient.

    Attributes:
        seeds: calls of ``cggr::scatter_rows``, where the gradient of the rows begins, in order.
        rows, keep: [B, K], see ``cggr::gather_rows``. length: S.
        backward: the nodes that depend on the seeds.
    """

    seeds: tuple[Node, ...]
    rows: Node
    keep: Node
    length: Any
    backward: frozenset[Node]

    @property
    def factors(self) -> Node | None:
        """What the markers' gradients are multiplied with at the rows, float32 [B, K]; None for 1."""
        weighed = self.rows.target is ops.scale_selected_grads.default
        return self.rows.all_input_nodes[1] if weighed else None


def find_selections(graph: Graph) -> list[JointSelection]:
    """The selections, in the order of their gathers."""
    seeds: dict[Any, list[Node]] = defaultdict(list)
    for seed in graph.find_nodes(op="call_function", target=ops.scatter_rows.default):
        seeds[seed.args[1:]].append(seed)
    gathers = [n.args[1:] for n in graph.find_nodes(op="call_function", target=ops.gather_rows.default)]
    order = {chosen: place for place, chosen in reversed(list(enumerate(gathers)))}
    found = [
        JointSelection(tuple(own), rows, keep, length, frozenset(descendants(own)))
        for (rows, keep, length), own in seeds.items()
    ]
    return sorted(found, key=lambda one: order.get((one.rows, one.keep), len(order)))


def selection_of(marker: Node, selections: list[JointSelection]) -> JointSelection | None:
    """Whose rows a marker in the backward pass keeps: those that its gradient comes from. None if that is not known.

    Forwards share no hidden state, so the gradient of one never comes to a marker of another.
    """
    reaching = [one for one in selections if marker in one.backward]
    return next(iter(reaching or (selections if len(selections) == 1 else [])), None)
