"""A runtime's figures as a stream: every few steps a dict, to whatever logs such."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module

from cggr_compile.registry import runtime
from cggr_compile.runtime import Runtime

Sink = Callable[[dict[str, Any]], object]
# the level as a number, for loggers that take numbers only
LEVELS = {"dense": 0.0, "loss": 1.0, "routed": 2.0}
# of Runtime.metrics(), those that change from step to step
FIGURES = (
    *("step", "ratio", "token_ratio", "tokens_selected", "tokens_total", "gradient_tokens"),
    *("avg_confidence", "avg_entropy", "avg_difficulty", "labels_overflow", "context_overflow"),
    *("level", "verify_max_error", "added_variance", "score_correlation", "concentration", "stale_steps"),
)


class MetricsLogger:
    """Hands figures of :meth:`Runtime.metrics` to a logger::

        log = cggr_compile.MetricsLogger(model, wandb.log, every=10)
        ...
        optimizer.step()
        log(loss=loss)  # at every tenth call: {"cggr/step": 40, "cggr/ratio": 0.25, ..., "loss": 1.7}

    A call that logs waits for the device; the others do nothing.

    Args:
        source: a model that is (or will be) compiled, its :class:`Runtime`, or a function without arguments that
            returns such a dict.
        sink: called with a dict of names to numbers and words, such as ``wandb.log``; or a path, to which each dict is
            appended as a line of JSON (``python -m cggr_compile report`` draws ``metrics.jsonl`` of a run's folder).
        every: calls from one dict to the next, at least 1.
        figures: which of the metrics. One that is None at a step is left out of its dict.
        prefix: goes in front of their names.
        numbers: make numbers of words and truth values (``level``: 2 for routed, 1 for loss, 0 for dense) and leave out
            other words.

    Raises:
        ValueError: for ``every`` below 1, or an unknown figure.
    """

    def __init__(
        self,
        source: Module | Runtime | Callable[[], Mapping[str, Any]],
        sink: Sink | str | Path,
        *,
        every: int = 1,
        figures: Iterable[str] = FIGURES,
        prefix: str = "cggr/",
        numbers: bool = False,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer >= 1, got {every!r}")
        self.figures = tuple(figures)
        if unknown := [name for name in self.figures if name not in Runtime().metrics()]:
            raise ValueError(f"figures must be keys of Runtime.metrics(), got {unknown}")
        if isinstance(source, Module):
            source = runtime(source)
        self._metrics = source.metrics if isinstance(source, Runtime) else source
        self._sink = _JsonLines(sink) if isinstance(sink, (str, Path)) else sink
        self._every, self._prefix, self._numbers = every, prefix, numbers
        self._calls = 0

    def __call__(self, **more: Any) -> None:
        """A step is over.

        Args:
            **more: further values for the dict, under their own names; tensors of one element become numbers.
        """
        self._calls += 1
        if self._calls % self._every == 0:
            self.log(**more)

    def log(self, **more: Any) -> None:
        """Hand over the figures now. Waits for the device."""
        metrics = self._metrics()
        found = {f"{self._prefix}{name}": metrics.get(name) for name in self.figures} | more
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in found.items()}
        if self._numbers:
            values = {name: _number(value) for name, value in values.items()}
        self._sink({name: value for name, value in values.items() if value is not None})


class _JsonLines:
    """Appends every dict to a file, as one line."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, values: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        return LEVELS.get(value)
    return None if value is None else float(value)
