"""The rung that ``min_tokens_ratio="auto"`` trains at: by measurements, and what is predicted between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cggr_compile.options import Options
from cggr_compile.readback import Readback
from cggr_compile.relative_variance import RelativeVariance
from cggr_compile.shared_readback import SharedReadback, sums
from cggr_compile.variance import FIGURES, added, move
from cggr_compile.variance_prediction import VariancePrediction, advice

# steps after a measurement or a move before a prediction moves, and how far it has to miss the bound to do so
_SETTLES, _MARGIN = 20, 1.1
# measurements in a row after which something is said
_ENOUGH = 2


class MeasuredRatio:
    """Keeps what has been measured and found since, and moves by it: at most one rung at a time.

    A measurement moves as soon as it arrives. Between two, what it says is predicted to change as the gradients of the
    tokens do, and moves where that is clear.

    Attributes:
        added: E / V_batch as last measured; None before the first measurement.
        level: the rung; None before the first.
    """

    def __init__(self) -> None:
        self._variance, self._gradients = Readback(), Readback()
        self.reset()

    def share(self, every: int, shared: Callable[..., SharedReadback]) -> list[SharedReadback]:
        """See :meth:`Schedule.share`. ``every``: steps from one measurement to the next."""
        self._variance = variance = shared("variance", sums, period=every, offset=1 % every)
        self._gradients = gradients = shared("gradients", sums)
        return [variance, gradients]

    def reset(self) -> None:
        """Forget everything that was observed."""
        self.added: float | None = None
        self.level: float | None = None
        self._variance.clear()
        self._gradients.clear()
        self._measured_at: float | None = None  # the ratio of the measurement under way
        self._added_at: float | None = None  # that of the last that has arrived
        self._then: list[float] | None = None  # sums of the tokens' gradients when it was made
        self._now: list[float] | None = None  # and lately
        self._settled = 0  # the step from which on predictions move
        self._against, self._advice = 0, ""  # measurements in a row that speak for a dense part of the batch

    def measured(self, figures: Tensor, ratio: float, gradients: Tensor | None) -> None:
        """A measurement at ``ratio``, on its way to the host.

        Args:
            figures: float32 [2] of :class:`cggr_compile.variance.VarianceMeter`.
            gradients: float32 [5], sums of ``relative_variance.normalised`` as they are now; None if unknown.
        """
        if gradients is not None:
            figures = torch.cat([figures, gradients.to(figures.device)])
        if self._variance.send(figures):
            self._measured_at = ratio

    def observe(self, gradients: Tensor) -> None:
        """Such sums after a training forward, on their way to the host."""
        self._gradients.send(gradients)

    def decide(self, options: Options, step: int, ladder: Sequence[float]) -> None:
        """Move the level by what has arrived. Does not wait for the device."""
        now, figures = self._gradients.receive(), self._variance.receive()
        self._now = self._now if now is None else now
        measured = figures is not None and self._take(figures)
        found = self._prediction()
        if found is None or not (measured or (now is not None and step >= self._settled)):
            return
        rung = next((rung for rung in reversed(ladder) if rung >= (self.level or 1.0)), ladder[0])
        if measured:
            self._weigh(options, found, rung, ladder)
        level = move(rung, ladder, found.at, options.variance_bound, 1.0 if measured else _MARGIN)
        if measured or level != rung:
            self.level, self._settled = level, step + _SETTLES

    def advice(self) -> str:
        """What to say where dense training on a part of each batch has been measured to be better; else empty."""
        return self._advice if self._against >= _ENOUGH else ""

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers. Waits for figures that are under way."""
        return {
            "level": self.level,
            "added": self.added,
            "measured_at": self._measured_at,
            "added_at": self._added_at,
            "settled": self._settled,
            "then": self._then,
            "now": self._now,
            "variance": self._variance.wait(),
            "gradients": self._gradients.wait(),
        }

    def under_way(self) -> dict[str, list[float] | None]:
        """What of it would arrive if the device were waited for."""
        return {"variance": self._variance.peek(), "gradients": self._gradients.peek()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`, whose numbers have been checked."""
        self.reset()
        self.level, self.added, self._settled = state["level"], state["added"], int(state["settled"] or 0)
        self._measured_at, self._added_at = state["measured_at"], state["added_at"]
        self._then, self._now = state["then"], state["now"]
        for readback, numbers in ((self._variance, state["variance"]), (self._gradients, state["gradients"])):
            if numbers is not None:
                readback.restore(numbers)

    def _take(self, figures: list[float]) -> bool:
        """Whether this is a measurement."""
        found = added(*figures[:FIGURES])
        if found is None or self._measured_at is None:
            return False
        self.added, self._added_at = found, self._measured_at
        self._then = self._now = figures[FIGURES:] or None
        return True

    def _prediction(self) -> VariancePrediction | None:
        if self.added is None or self._added_at is None:
            return None
        then, now = (None if numbers is None else RelativeVariance.of(numbers) for numbers in (self._then, self._now))
        return VariancePrediction(self.added, self._added_at, then, now)

    def _weigh(self, options: Options, found: VariancePrediction, rung: float, ladder: Sequence[float]) -> None:
        ratio = min(rung, ladder[1])
        self._advice = advice(found, ratio, trains=rung < 1.0, learned=options.predicts)
        self._against = self._against + 1 if self._advice else 0
