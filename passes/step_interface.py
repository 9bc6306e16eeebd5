"""What a rewritten graph takes and returns besides the user's arguments and results: packed and unpacked here only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from cggr_compile import compat

STATE = "cggr_state"


@dataclass(frozen=True)
class StepOutputs:
    """What a graph returns behind the user's results: nodes while it is built, tensors when it runs.

    Attributes:
        weights: of each forward that trains on selected positions, float32 [B, K], what the loss of each counts.
        selected: of each of these, int64 [B, K], the positions, -1 for an unused slot.
        stats: float32, the figures of ``cggr::stats``, of all forwards together; None where there are none.
    """

    weights: tuple[Any, ...] = ()
    selected: tuple[Any, ...] = ()
    stats: Any = None

    def append_to(self, graph: Graph) -> None:
        """Let a graph return these nodes behind what it returns."""
        output = graph.output_node()
        results: Any = output.args[0]
        output.args = ((*results, *self._flat()),)

    @property
    def form(self) -> Form:
        """How many there are."""
        return Form(len(self.selected), self.stats is not None)

    def clone(self) -> StepOutputs:
        """Copies, for results that the next step overwrites."""
        return self.form.of([value.clone() for value in self._flat()])

    def _flat(self) -> list[Any]:
        return [*self.weights, *self.selected, *([] if self.stats is None else [self.stats])]


@dataclass(frozen=True)
class Form:
    """How many results a graph returns behind the user's.

    Attributes:
        selections: the number of forwards that train on selected positions; 0 where all positions are trained on.
        stats: whether there are figures.
    """

    selections: int = 0
    stats: bool = False

    def of(self, values: Sequence[Any]) -> StepOutputs:
        """These results by their names."""
        n = self.selections
        return StepOutputs(tuple(values[:n]), tuple(values[n : 2 * n]), values[2 * n] if self.stats else None)

    def split(self, results: Sequence[Any]) -> tuple[list[Any], StepOutputs]:
        """The user's results, and the others."""
        users = len(results) - 2 * self.selections - self.stats
        return list(results[:users]), self.of(results[users:])


def state_input(graph: Graph, fake_mode: Any, device: torch.device) -> Node:
    """The last input, int64 [2] on ``device``: seed and step, which random selections depend on. Added if need be."""
    last: Node = list(graph.find_nodes(op="placeholder"))[-1]
    if last.target == STATE:
        return last
    with graph.inserting_after(last):
        state = graph.placeholder(STATE)
    with fake_mode:
        state.meta["example_value"] = torch.empty(2, dtype=torch.int64, device=device)
    compat.without_source(state)
    return state
