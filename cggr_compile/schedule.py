"""Which ratio a training step runs at: a function of the options, the step and what earlier steps have shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from cggr_compile.measured_ratio import MeasuredRatio
from cggr_compile.ops.metrics import STAT_NAMES
from cggr_compile.options import Options
from cggr_compile.readback import Readback
from cggr_compile.shared_readback import SharedReadback

_SLACK = 1e-9  # rounding of the linear rule must not reach the next rung
# not 0.75: on an H100 it saved a model of 23M parameters nothing
_AUTO_LADDER = (1.0, 0.5, 0.375, 0.25)
# of a state: what there was not before it predicted, and what is several numbers
_PREDICTS = {"added_at", "settled", "then", "now", "gradients"}
_LISTS = {"figures", "variance", "then", "now", "gradients"}
_TOTAL, _CONFIDENCE = STAT_NAMES.index("tokens_total"), STAT_NAMES.index("avg_confidence")


def rungs(options: Options) -> tuple[float, ...]:
    """The ratios that training under these options can come to, in descending order.

    One, ``min_tokens_ratio``, unless ``warmup_steps`` or ``dynamic_threshold`` move it, or it is ``auto``.
    """
    base = options.min_tokens_ratio
    if base == "auto":
        return tuple(sorted({1.0, *map(float, options.ladder or _AUTO_LADDER)}, reverse=True))
    low, high = _range(options, base)
    if low == high:
        return (base,)
    given = options.ladder if options.ladder is not None else _default_ladder(base)
    ladder = sorted({*map(float, given), base, *([1.0] if options.warmup_steps else [])})
    neighbours = zip([0.0, *ladder], ladder, strict=False)
    reached = [rung for below, rung in neighbours if below < high - _SLACK and rung > low - _SLACK]
    return tuple(reversed(reached))


def _range(options: Options, base: float) -> tuple[float, float]:
    """The smallest and the largest target."""
    swing = base * options.threshold_sensitivity if options.dynamic_threshold else 0.0
    return base - swing, 1.0 if options.warmup_steps else min(base + swing, 1.0)


def _default_ladder(base: float) -> list[float]:
    """1, 3/4, 1/2, 3/8, 1/4 and from there halves, as far as they are above ``base``; 3/4 and 1/2 of ``base``."""
    above = [1.0, 0.75, 0.5, 0.375, *(0.5**power for power in range(2, 15))]
    return [*(ratio for ratio in above if ratio > base), 0.75 * base, 0.5 * base]


def round_up(ratio: float, ladder: Sequence[float]) -> float:
    """The smallest rung that is not below ``ratio``; the largest one if all are."""
    return min((rung for rung in ladder if rung >= ratio - _SLACK), default=max(ladder))


def confidence_factor(confidence: Any, sensitivity: float) -> Any:
    """``1 + sensitivity * (1 - 2 * confidence)``, a number or a tensor; 1 at a mean top-1 probability of 1/2."""
    return 1.0 + sensitivity * (1.0 - 2.0 * confidence)


def target(options: Options, step: int, confidence: float | None = None, level: float | None = None) -> float:
    """What the ratio should be at ``step`` (from 0), before it is rounded up to a rung.

    Curriculum: it falls linearly from 1 at step 0 to ``min_tokens_ratio`` at step ``warmup_steps``. With
    ``dynamic_threshold`` that is multiplied by ``1 + threshold_sensitivity * (1 - 2 * confidence)``, at most to 1.
    With ``min_tokens_ratio="auto"`` it is 1 for ``warmup_steps`` steps, and then the level that has been measured.

    Args:
        confidence: the router's mean top-1 probability over the candidates, in [0, 1]; None if unknown.
        level: the rung that the measured variance, or what is predicted from it, allows; None if unknown.
    """
    base = options.min_tokens_ratio
    if base == "auto":
        return 1.0 if level is None or step < options.warmup_steps else level
    left = 1.0 - step / options.warmup_steps if step < options.warmup_steps else 0.0
    ratio = base + (1.0 - base) * left
    if options.dynamic_threshold and confidence is not None:
        ratio *= confidence_factor(confidence, options.threshold_sensitivity)
    return min(ratio, 1.0)


class Schedule:
    """The moving parts of one model's schedule; a step's ratio is decided once, so that micro-batches share it.

    Attributes:
        auto: what ``min_tokens_ratio="auto"`` goes by.
    """

    def __init__(self) -> None:
        self.auto, self._figures = MeasuredRatio(), Readback()
        self.reset()

    def share(self, options: Options, shared: Callable[..., SharedReadback]) -> list[SharedReadback]:
        """Decide by what all processes have measured, at the same step in each.

        Args:
            shared: makes a readback, of a topic, a way to combine, and perhaps ``period`` and ``offset``.

        Returns:
            what has to be advanced at every step.
        """
        if options.dynamic_threshold:
            self._figures = found = shared("confidence", _mean_confidence)
            return [found]
        return self.auto.share(options.measure_every, shared) if options.min_tokens_ratio == "auto" else []

    def reset(self) -> None:
        """Forget everything that was observed."""
        self.auto.reset()
        self._figures.clear()
        self._confidence: float | None = None
        self._decided: tuple[int, float] | None = None  # (step, target)

    def ratio(self, options: Options, step: int) -> float:
        """:func:`target` of this step, from what has arrived so far. Does not wait for the device."""
        if self._decided is None or self._decided[0] != step:
            self._confidence = _confidence(self._figures.receive(), self._confidence)
            if options.min_tokens_ratio == "auto":
                self.auto.decide(options, step, rungs(options))
            self._decided = (step, target(options, step, self._confidence, self.auto.level))
        return self._decided[1]

    def preview(self, options: Options, step: int) -> float:
        """What :meth:`ratio` would say, deciding nothing. Waits for figures that are under way."""
        if self._decided is not None and self._decided[0] == step:
            return self._decided[1]
        copy = Schedule()
        arriving = {"figures": self._figures.peek(), **self.auto.under_way()}
        copy.load_state_dict({**self.state_dict(step), **arriving}, step)
        return copy.ratio(options, step)

    def observe(self, stats: Tensor) -> None:
        """The figures of a training forward (``cggr::stats``), on their way to the host."""
        self._figures.send(stats)

    def state_dict(self, step: int) -> dict[str, Any]:
        """Plain numbers. Waits for figures that are under way."""
        return {
            "target": self._decided[1] if self._decided is not None and self._decided[0] == step else None,
            "confidence": self._confidence,
            "figures": self._figures.wait(),
            **self.auto.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Resume from :meth:`state_dict`, which may be one of a version that did not predict.

        Raises:
            ValueError: if ``state`` is no such dict.
        """
        fresh = Schedule().state_dict(0)
        if (
            not isinstance(state, Mapping)
            or set(fresh) - set(state) not in (set(), _PREDICTS)
            or set(state) - set(fresh)
        ):
            raise ValueError(f"state: schedule must have the keys {sorted(fresh)}, got {state!r}")
        state = {**fresh, **state}
        for name, value in state.items():
            if name in _LISTS:
                if not (value is None or (isinstance(value, list) and all(map(_is_number, value)))):
                    raise ValueError(f"state: schedule's {name} must be a list of numbers or None, got {value!r}")
            elif not (value is None or _is_number(value)):
                raise ValueError(f"state: schedule's {name} must be a number or None, got {value!r}")
        self.reset()
        self.auto.load_state_dict(state)
        self._confidence = state["confidence"]
        self._decided = None if state["target"] is None else (step, state["target"])
        if state["figures"] is not None:
            self._figures.restore(state["figures"])


def _mean_confidence(values: list[Any]) -> list[float] | None:
    """The figures of all processes as one's: candidates, and the mean confidence over them."""
    sent = [value for value in values if _confidence(value, None) is not None]
    if not sent:
        return None
    total = sum(value[_TOTAL] for value in sent)
    figures = [0.0] * len(STAT_NAMES)
    figures[_TOTAL] = total
    figures[_CONFIDENCE] = sum(value[_TOTAL] * value[_CONFIDENCE] for value in sent) / total
    return figures


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _confidence(figures: list[float] | None, otherwise: float | None) -> float | None:
    """Mean confidence, from figures that have arrived and are about at least one candidate. NaN is no router's."""
    if figures is None or not figures[_TOTAL] or math.isnan(figures[_CONFIDENCE]):
        return otherwise
    return figures[_CONFIDENCE]
