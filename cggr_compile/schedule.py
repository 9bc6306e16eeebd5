"""Which ratio a training step runs at: a function of the options, the step and what earlier steps have shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cggr_compile.ops.metrics import STAT_NAMES
from cggr_compile.options import Options
from cggr_compile.readback import Readback

_SLACK = 1e-9  # rounding of the linear rule must not reach the next rung
_TOTAL, _CONFIDENCE = STAT_NAMES.index("tokens_total"), STAT_NAMES.index("avg_confidence")


def rungs(options: Options) -> tuple[float, ...]:
    """The ratios that training under these options can come to, in descending order.

    One, ``min_tokens_ratio``, unless ``warmup_steps`` or ``dynamic_threshold`` move it.
    """
    base = options.min_tokens_ratio
    low, high = _range(options)
    if low == high:
        return (base,)
    given = options.ladder if options.ladder is not None else _default_ladder(base)
    ladder = sorted({*map(float, given), base, *([1.0] if options.warmup_steps else [])})
    neighbours = zip([0.0, *ladder], ladder, strict=False)
    reached = [rung for below, rung in neighbours if below < high - _SLACK and rung > low - _SLACK]
    return tuple(reversed(reached))


def _range(options: Options) -> tuple[float, float]:
    """The smallest and the largest target."""
    base = options.min_tokens_ratio
    swing = base * options.threshold_sensitivity if options.dynamic_threshold else 0.0
    return base - swing, 1.0 if options.warmup_steps else min(base + swing, 1.0)


def _default_ladder(base: float) -> list[float]:
    """1, 3/4, 1/2, 3/8, 1/4 and from there halves, as far as they are above ``base``; 3/4 and 1/2 of ``base``."""
    above = [1.0, 0.75, 0.5, 0.375, *(0.5**power for power in range(2, 15))]
    return [*(ratio for ratio in above if ratio > base), 0.75 * base, 0.5 * base]


def round_up(ratio: float, ladder: Sequence[float]) -> float:
    """The smallest rung that is not below ``ratio``; the largest one if all are."""
    return min((rung for rung in ladder if rung >= ratio - _SLACK), default=max(ladder))


def target(options: Options, step: int, confidence: float | None) -> float:
    """What the ratio should be at ``step`` (from 0), before it is rounded up to a rung.

    Curriculum: it falls linearly from 1 at step 0 to ``min_tokens_ratio`` at step ``warmup_steps``. With
    ``dynamic_threshold`` that is multiplied by ``1 + threshold_sensitivity * (1 - 2 * confidence)``, at most to 1.

    Args:
        confidence: the router's mean top-1 probability over the candidates, in [0, 1]; None if unknown.
    """
    base = options.min_tokens_ratio
    left = 1.0 - step / options.warmup_steps if step < options.warmup_steps else 0.0
    ratio = base + (1.0 - base) * left
    if options.dynamic_threshold and confidence is not None:
        ratio *= 1.0 + options.threshold_sensitivity * (1.0 - 2.0 * confidence)
    return min(ratio, 1.0)


class Schedule:
    """The moving parts of one model's schedule; a step's ratio is decided once, so that micro-batches share it."""

    def __init__(self) -> None:
        self._figures = Readback()
        self._confidence: float | None = None
        self._decided: tuple[int, float] | None = None  # (step, target)

    def ratio(self, options: Options, step: int) -> float:
        """:func:`target` of this step, from what has arrived so far. Does not wait for the device."""
        if self._decided is None or self._decided[0] != step:
            self._confidence = _confidence(self._figures.receive(), self._confidence)
            self._decided = (step, target(options, step, self._confidence))
        return self._decided[1]

    def preview(self, options: Options, step: int) -> float:
        """What :meth:`ratio` would say, deciding nothing. Waits for figures that are under way."""
        if self._decided is not None and self._decided[0] == step:
            return self._decided[1]
        return target(options, step, _confidence(self._figures.wait(), self._confidence))

    def observe(self, stats: Tensor) -> None:
        """The figures of a training forward (``cggr::stats``), on their way to the host."""
        self._figures.send(stats)

    def state_dict(self, step: int) -> dict[str, Any]:
        """Plain numbers. Waits for figures that are under way."""
        decided = self._decided[1] if self._decided is not None and self._decided[0] == step else None
        return {"target": decided, "confidence": self._confidence, "under_way": self._figures.wait()}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Resume from :meth:`state_dict`.

        Raises:
            ValueError: if ``state`` is no such dict.
        """
        if not isinstance(state, Mapping) or set(state) != {"target", "confidence", "under_way"}:
            raise ValueError(f"state: schedule must have the keys target, confidence and under_way, got {state!r}")
        for name in ("target", "confidence"):
            if not (state[name] is None or _is_number(state[name])):
                raise ValueError(f"state: schedule's {name} must be a number or None, got {state[name]!r}")
        figures = state["under_way"]
        if not (figures is None or (isinstance(figures, list) and all(map(_is_number, figures)))):
            raise ValueError(f"state: schedule's under_way must be a list of numbers or None, got {figures!r}")
        self.reset()
        self._confidence = state["confidence"]
        self._decided = None if state["target"] is None else (step, state["target"])
        if figures is not None:
            self._figures.send(torch.tensor(figures))

    def reset(self) -> None:
        """Forget everything that was observed."""
        self._figures, self._confidence, self._decided = Readback(), None, None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _confidence(figures: list[float] | None, otherwise: float | None) -> float | None:
    """Mean confidence, from figures that have arrived and are about at least one candidate."""
    return otherwise if figures is None or not figures[_TOTAL] else figures[_CONFIDENCE]
