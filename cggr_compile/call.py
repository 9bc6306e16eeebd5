"""One call of a compiled graph: what it is given, and what of it counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cggr_compile.options import Options
from cggr_compile.passes.step_interface import PredictorKey, StepOutputs
from cggr_compile.report import GraphReport
from cggr_compile.runtime import Measure, Runtime

if TYPE_CHECKING:
    from cggr_compile.selection_view import SelectionView


@dataclass
class Drawn:
    """What a call was given: the ratio that the schedule wanted, how often slots were doubled, (seed, step), int64 [2]
    on the device, and predictors."""

    ratio: float | None = None
    growth: int | None = None
    state: Tensor | None = None
    predictors: tuple[Tensor, ...] | None = None


class Call:
    """A forward of the user's training.

    Attributes:
        repeats: whether it is the recomputation of an earlier call.
        drawn: what it was given so far.
    """

    repeats = False

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.drawn = runtime, Drawn()

    def ratio(self, options: Options) -> float:
        """What the schedule wants for this call."""
        self.drawn.ratio = self.runtime.ratio(options)
        return self.drawn.ratio

    def growth(self) -> int:
        """How often slots are doubled in this call."""
        self.drawn.growth = self.runtime.growth
        return self.drawn.growth

    def state(self, device: torch.device) -> Tensor:
        """(seed, step) of this call, int64 [2] on ``device``; advances the step, if that is automatic."""
        self.drawn.state = self.runtime.state(device)
        self.advance()
        return self.drawn.state

    def predictors(self, keys: Sequence[PredictorKey], device: torch.device) -> tuple[Tensor, ...]:
        """See :meth:`Runtime.predictors`."""
        self.drawn.predictors = self.runtime.predictors(keys, device)
        return self.drawn.predictors

    def advance(self) -> None:
        """A training forward without a selection happens."""
        self.runtime.advance()

    def measure(self, measurement: Measure, ratio: float) -> None:
        """See :meth:`Runtime.measure`."""
        self.runtime.measure(measurement, ratio)

    def verified(self, error: float, worst: str) -> None:
        """See :meth:`Runtime.verified`."""
        self.runtime.verified(error, worst)

    def hear_failures(self, failure: str, steps: int) -> str:
        """See :meth:`Runtime.hear_failures`."""
        return self.runtime.hear_failures(failure, steps)

    def grow(self, stats: Tensor, most: int) -> None:
        """See :meth:`Runtime.grow`."""
        self.runtime.grow(stats, most)

    def look(self, report: GraphReport, view: Callable[[], SelectionView]) -> None:
        """The selection of this call can be looked at, which costs a router's forward."""

    def record(self, report: GraphReport, returned: StepOutputs) -> None:
        """See :meth:`Runtime.record`."""
        self.runtime.record(report, returned)


class Unrecorded(Call):
    """A forward that is no step: step, schedule, selection and metrics of its model stay as they are."""

    def advance(self) -> None:
        pass

    def measure(self, measurement: Measure, ratio: float) -> None:
        pass

    def verified(self, error: float, worst: str) -> None:
        pass

    def hear_failures(self, failure: str, steps: int) -> str:
        return failure

    def grow(self, stats: Tensor, most: int) -> None:
        pass

    def record(self, report: GraphReport, returned: StepOutputs) -> None:
        pass


class ObservedCall(Unrecorded):
    """A forward under :meth:`Runtime.observed`, which is told the report of the graph that runs."""

    def ratio(self, options: Options) -> float:
        self.drawn.ratio = self.runtime.preview(options)
        return self.drawn.ratio

    def look(self, report: GraphReport, view: Callable[[], SelectionView]) -> None:
        report.view = view()

    def record(self, report: GraphReport, returned: StepOutputs) -> None:
        self.runtime.observe(report)
