"""What a rewritten graph takes and returns besides the user's arguments and results: packed and unpacked here only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from cggr_compile import compat

STATE = "cggr_state"
# What a graph returns, by the order in which it does, where it trains on selected positions.
SELECTIVE = ("weights", "selected", "stats")
# ... and where it trains on all of them, but the router is observed.
OBSERVING = ("stats",)


@dataclass(frozen=True)
class StepOutputs:
    """What a graph returns behind the user's results: nodes while it is built, tensors when it runs.

    Attributes:
        weights: float32 [B, K], what the loss of each selected position counts.
        selected: int64 [B, K], the positions, -1 for an unused slot.
        stats: float32, the figures of ``cggr::stats``.
    """

    weights: Any = None
    selected: Any = None
    stats: Any = None

    def append_to(self, graph: Graph) -> None:
        """Let a graph return these nodes behind what it returns."""
        output = graph.output_node()
        results: Any = output.args[0]
        output.args = ((*results, *(node for node in vars(self).values() if node is not None)),)

    def clone(self) -> StepOutputs:
        """Copies, for results that the next step overwrites."""
        return StepOutputs(**{name: None if value is None else value.clone() for name, value in vars(self).items()})


def split(results: Sequence[Any], names: Sequence[str]) -> tuple[list[Any], StepOutputs]:
    """The user's results, and the others by their names (``SELECTIVE``, ``OBSERVING`` or none)."""
    users = len(results) - len(names)
    return list(results[:users]), StepOutputs(**dict(zip(names, results[users:], strict=True)))


def add_state_input(graph: Graph, fake_mode: Any, device: torch.device) -> Node:
    """The last input, int64 [2] on ``device``: seed and step, which random selections depend on."""
    last = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(last):
        state = graph.placeholder(STATE)
    with fake_mode:
        state.meta["example_value"] = torch.empty(2, dtype=torch.int64, device=device)
    compat.without_source(state)
    return state
