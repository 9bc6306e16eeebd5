"""What happened to each graph: records of the passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cggr_compile.causes import Cause

if TYPE_CHECKING:
    from torch.fx import Graph

    from cggr_compile.passes.base import Level
    from cggr_compile.selection_view import SelectionView


@dataclass
class PassRecord:
    """One pass over one graph. ``added``/``removed`` count operators by name; ``seconds`` is host time.

    ``cause``: why the graph is compiled as it was captured, where this pass decided that.
    ``matched`` is None where nothing is known: the compiled graph came out of a cache (see ``pass_records.py``).
    """

    name: str
    stage: str
    matched: bool | None
    reason: str
    details: dict[str, Any] = field(default_factory=dict)
    cause: Cause | None = None
    added: dict[str, int] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Verification:
    """What comparing the row-sparse backward with the dense one has shown so far (option ``verify``).

    Attributes:
        steps: training steps compared.
        max_error: the largest error of any gradient (:class:`cggr_compile.verify.Verifier` defines it), None before
            the first step.
        worst: the parameter or input it was found in.
        tolerance: what max_error may be.
        captured_error: the largest difference between the rewritten and the captured graph, at the first step.
        note: why steps were not compared, if some were not.
    """

    steps: int = 0
    max_error: float | None = None
    worst: str | None = None
    tolerance: float | None = None
    captured_error: float | None = None
    note: str = ""

    def add(self, error: float, worst: str) -> None:
        self.steps += 1
        if self.max_error is None or error > self.max_error:
            self.max_error, self.worst = error, worst

    def __str__(self) -> str:
        text = "nothing compared"
        if self.max_error is not None:
            text = f"{self.steps} steps, largest error {self.max_error:.1e} in {self.worst}"
            text += f" (tolerance {self.tolerance:.1e})"
        if self.captured_error is not None:
            text += f"; {self.captured_error:.1e} from the captured graph"
        return f"{text}; {self.note}" if self.note else text


@dataclass
class GraphReport:
    """One captured graph: was it rewritten, by which passes, or why not.

    Attributes:
        index: counts the model's training graphs, and by themselves its inference graphs.
        level: how much of the training step is computed on selected positions: "routed", head, loss and the backward
            pass through the layers; "loss", head and loss, where no stack of layers was found, and the gradient below
            is that of the selected loss, exact; "dense", nothing.
        reason: what was found, or why it is not rewritten, in one sentence.
        cause: why the level is not "routed", of the closed list :class:`cggr_compile.causes.Cause`; None exactly if it
            is.
        obstacle: the text of the cause where the level is "loss": why the layers were not found, and what helps.
        ratio: share of the positions that it trains on; a schedule has one graph per ratio.
        gradient: what the option ``gradient`` came to in a graph that trains on selected positions, "routed" or
            "exact"; empty in others.
        selection: what the option ``selection`` came to there; empty in others.
        waiting: whether it is yet to be compiled, because no step has come to its ratio.
        training: whether the graph was captured in a training step (gradients on, modules in train mode).
        compiler: what compiled it: "Inductor CUDA", "Inductor CPU" or "eager".
        verification: the outcome of the option ``verify``; None if it is off.
        view: the selection of the last call that ``explain`` made, of a graph that trains on selected positions.
    """

    index: int
    training: bool
    compiler: str
    options: dict[str, Any]
    level: Level = "dense"
    reason: str = ""
    cause: Cause | None = Cause.NOT_TRAINING
    obstacle: str = ""
    ratio: float = 1.0
    gradient: str = ""
    selection: str = ""
    waiting: bool = False
    passes: list[PassRecord] = field(default_factory=list)
    verification: Verification | None = None
    view: SelectionView | None = None

    @property
    def matched(self) -> bool:
        """Whether the graph trains on selected positions."""
        return self.level != "dense"

    def record(self, name: str) -> PassRecord | None:
        """What the pass of this name did; None if it did not get its turn."""
        return next((record for record in self.passes if record.name == name), None)

    def refuse(self, cause: Cause, reason: str) -> None:
        """The graph, or at the level "loss" the backward pass below the head, stays as it is: the cause, its text."""
        self.cause = cause
        if self.level == "loss":
            self.obstacle = reason
        else:
            self.reason = reason

    def as_dict(self) -> dict[str, Any]:
        """For JSON: a cause is its name."""
        fields = asdict(replace(self, view=None), dict_factory=_with_names)
        return {name: value for name, value in fields.items() if name != "view"} | {"matched": self.matched}


def _with_names(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value.name if isinstance(value, Cause) else value for key, value in items}


def operator_counts(graph: Graph) -> Counter[str]:
    return Counter(str(node.target).rsplit("built-in ", 1)[-1] for node in graph.nodes if node.op.startswith("call_"))


def delta_text(added: Mapping[str, int], removed: Mapping[str, int]) -> str:
    """``+2 linear, -1 cross_entropy``, the first six."""
    signs = [f"+{n} {_short(name)}" for name, n in added.items()] + [
        f"-{n} {_short(name)}" for name, n in removed.items()
    ]
    return ", ".join(signs[:6]) + (f", … ({len(signs) - 6} more)" if len(signs) > 6 else "")


def _short(name: str) -> str:
    """``<function cross_entropy at 0x7f...>`` -> ``cross_entropy``."""
    parts = name.strip("<>").split()
    return next((parts[i + 1] for i, part in enumerate(parts[:-1]) if part in ("function", "method")), name)
