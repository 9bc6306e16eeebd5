"""A forward that is run again in the backward pass, by ``torch.utils.checkpoint``, is the same forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cggr_compile import compat
from cggr_compile.options import Options
from cggr_compile.passes.step_interface import StepOutputs
from cggr_compile.report import GraphReport
from cggr_compile.runtime import Runtime
from cggr_compile.variance import Gradient, VarianceMeter


@dataclass
class _Drawn:
    """What a call was given: the ratio that the schedule wanted, how often slots were doubled, and (seed, step), int64
    [2] on the device."""

    ratio: float | None = None
    growth: int | None = None
    state: Tensor | None = None


# for every checkpoint whose backward is to come, what each model was given inside of it, call by call
_forwards: WeakKeyDictionary[Any, dict[Runtime, list[_Drawn]]] = WeakKeyDictionary()
# for every recomputation under way, known by its pack function, how many calls of each model it has repeated
_repeated: WeakKeyDictionary[Any, Counter[Runtime]] = WeakKeyDictionary()


class Call:
    """One call of a compiled graph: a new forward, or a recomputation of an earlier one.

    A recomputation takes the selection and the ratio of the forward that it repeats. It does not count as a step, it
    is not measured, and the runtime does not note it.

    Which forward that is follows from the saved-tensors hooks in force. Those of a checkpoint, in its forward and in
    its recomputation, hold the same object; the calls inside of it are repeated in their order.

    Attributes:
        repeats: whether this is a recomputation.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.repeats = False
        self._drawn = _Drawn()
        if compat.under_saved_tensors_hooks():
            self._follow_checkpoints()

    def _follow_checkpoints(self) -> None:
        around = []  # checkpoints inside the recomputation, which are in their own forward
        for pack in compat.saved_tensors_packers():
            if (found := compat.checkpoint_of(pack)) is None:
                continue
            checkpoint, recomputes = found
            if recomputes:
                counts = _repeated.setdefault(pack, Counter())
                forwards = _forwards.get(checkpoint, {}).get(self.runtime, [])[counts[self.runtime] :]
                counts[self.runtime] += 1
                self.repeats = True
                self._drawn = forwards[0] if forwards else self._drawn
                break
            around.append(checkpoint)
        for checkpoint in around:
            _forwards.setdefault(checkpoint, {}).setdefault(self.runtime, []).append(self._drawn)

    def ratio(self, options: Options) -> float:
        """What the schedule wants for this call.

        Raises:
            RuntimeError: in a recomputation of what another graph, or none of this backend, computed.
        """
        if not self.repeats:
            self._drawn.ratio = self.runtime.ratio(options)
        if self._drawn.ratio is None:
            raise _unknown()
        return self._drawn.ratio

    def growth(self) -> int:
        """How often slots are doubled in this call.

        Raises:
            RuntimeError: as :meth:`ratio` does.
        """
        if not self.repeats:
            self._drawn.growth = self.runtime.growth
        if self._drawn.growth is None:
            raise _unknown()
        return self._drawn.growth

    def state(self, device: torch.device) -> Tensor:
        """(seed, step) of this call, int64 [2] on ``device``; a new forward advances the step, if that is automatic.

        Raises:
            RuntimeError: as :meth:`ratio` does.
        """
        if not self.repeats:
            self._drawn.state = self.runtime.state(device)
            self.runtime.advance()
        if self._drawn.state is None:
            raise _unknown()
        return self._drawn.state

    def advance(self) -> None:
        """A training forward without a selection happens."""
        if not self.repeats:
            self.runtime.advance()

    def measure(
        self,
        meter: VarianceMeter,
        args: Sequence[Any],
        ratio: float,
        gradients: Callable[[], tuple[Gradient, Gradient]],
    ) -> None:
        """See :meth:`Runtime.measure`."""
        if not self.repeats:
            self.runtime.measure(meter, args, ratio, gradients)

    def grow(self, stats: Tensor, most: int) -> None:
        """See :meth:`Runtime.grow`."""
        if not self.repeats:
            self.runtime.grow(stats, most)

    def record(self, report: GraphReport, returned: StepOutputs) -> None:
        """See :meth:`Runtime.record`."""
        if not self.repeats:
            self.runtime.record(report, returned)


def _unknown() -> RuntimeError:
    return RuntimeError(
        "torch.utils.checkpoint recomputes a forward that another graph computed, or none of the backend cggr: "
        "its selection is not known. Was the model compiled, or compiled anew, between forward and backward?"
    )
