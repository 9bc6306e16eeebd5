"""What a rewritten graph takes and returns besides the user's arguments and results: packed and unpacked here only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from cggr_compile import compat
from cggr_compile.passes.nodes import fake_value

STATE = "cggr_state"
PREDICTOR = "cggr_predictor_"


@dataclass(frozen=True)
class PredictorKey:
    """Which network predicts a forward's difficulties; a model keeps one for each key.

    Attributes:
        forward: number of the forward in its graph. layer: blocks that it reads. features: what it sees of a position.
    """

    forward: int
    layer: int
    features: int

    def __str__(self) -> str:
        return f"{self.forward}/{self.layer}/{self.features}"

    @classmethod
    def parse(cls, text: Any) -> PredictorKey:
        """The key that is written so.

        Raises:
            ValueError: it is none.
        """
        parts = text.split("/") if isinstance(text, str) else []
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            raise ValueError(f"a predictor's key must be 'forward/layer/features', three numbers, got {text!r}")
        return cls(*map(int, parts))


def example_step_inputs(graph: Graph, users: int) -> list[torch.Tensor]:
    """Zeros like what a graph takes behind its first ``users`` inputs, to compile it with."""
    taken = [fake_value(node) for node in graph.find_nodes(op="placeholder")[users:]]
    return [torch.zeros(value.shape, dtype=value.dtype, device=value.device) for value in taken]


@dataclass(frozen=True)
class StepOutputs:
    """What a graph returns behind the user's results: nodes while it is built, tensors when it runs.

    Attributes:
        weights: of each forward that trains on selected positions, float32 [B, K], what the loss of each counts.
        selected: of each of these, int64 [B, K], the positions, -1 for an unused slot.
        stats: float32, the figures of ``cggr::stats``, of all forwards together; None where there are none.
        moments: float32 [5], ``cggr::gradient_moments`` of all forwards together; None where no gradients are known.
        predictors: by their keys, float32, what they are after the step.
    """

    weights: tuple[Any, ...] = ()
    selected: tuple[Any, ...] = ()
    stats: Any = None
    moments: Any = None
    predictors: Mapping[PredictorKey, Any] = field(default_factory=dict)

    def append_to(self, graph: Graph) -> None:
        """Let a graph return these nodes behind what it returns."""
        output = graph.output_node()
        results: Any = output.args[0]
        output.args = ((*results, *self._flat()),)

    @property
    def form(self) -> Form:
        """How many there are."""
        return Form(len(self.selected), self.stats is not None, self.moments is not None, tuple(self.predictors))

    def clone(self) -> StepOutputs:
        """Copies, for results that the next step overwrites."""
        return self.form.of([value.clone() for value in self._flat()])

    def _flat(self) -> list[Any]:
        figures = [each for each in (self.stats, self.moments) if each is not None]
        return [*self.weights, *self.selected, *figures, *self.predictors.values()]


@dataclass(frozen=True)
class Form:
    """How many results a graph returns behind the user's.

    Attributes:
        selections: the number of forwards that train on selected positions; 0 where all positions are trained on.
        stats: whether there are figures. moments: whether there are moments.
        predictors: which there are.
    """

    selections: int = 0
    stats: bool = False
    moments: bool = False
    predictors: tuple[PredictorKey, ...] = ()

    def of(self, values: Sequence[Any]) -> StepOutputs:
        """These results by their names."""
        n = self.selections
        rest = iter(values[2 * n :])
        stats, moments = (next(rest) if there else None for there in (self.stats, self.moments))
        predictors = dict(zip(self.predictors, rest, strict=True))
        return StepOutputs(tuple(values[:n]), tuple(values[n : 2 * n]), stats, moments, predictors)

    def split(self, results: Sequence[Any]) -> tuple[list[Any], StepOutputs]:
        """The user's results, and the others."""
        users = len(results) - 2 * self.selections - self.stats - self.moments - len(self.predictors)
        return list(results[:users]), self.of(results[users:])


def state_input(graph: Graph, fake_mode: Any, device: torch.device) -> Node:
    """The input int64 [2] on ``device`` behind the user's: seed and step, which random selections depend on. Added if
    need be."""
    inputs: list[Node] = list(graph.find_nodes(op="placeholder"))
    found = [node for node in inputs if node.target == STATE]
    if found:
        return found[0]
    users = [node for node in inputs if not str(node.target).startswith(PREDICTOR)]
    return _input(graph, users[-1], STATE, fake_mode, torch.int64, 2, device)


def predictor_input(graph: Graph, fake_mode: Any, device: torch.device, key: PredictorKey, size: int) -> Node:
    """A new last input, float32 [size] on ``device``: a predictor before the step."""
    last: Node = list(graph.find_nodes(op="placeholder"))[-1]
    return _input(graph, last, f"{PREDICTOR}{key.forward}", fake_mode, torch.float32, size, device)


def _input(
    graph: Graph, after: Node, name: str, fake_mode: Any, dtype: torch.dtype, size: int, device: torch.device
) -> Node:
    with graph.inserting_after(after):
        node = graph.placeholder(name)
    with fake_mode:
        node.meta["example_value"] = torch.empty(size, dtype=dtype, device=device)
    compat.without_source(node)
    return node
