"""What runs measured, to be compared: one record per run, a picture, a JSON file, and the report on all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

WARMUP = 3  # steps that may compile: kept out of every time below


Rows = list[tuple[str, str, Sequence[float | None]]]  # of a table: title, format, a figure of each run


@dataclass
class StepTimes:
    """Seconds of some training steps; ``step`` also holds clipping and the optimizer."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)

    def add(self, forward: float, backward: float, step: float) -> None:
        self.forward.append(forward)
        self.backward.append(backward)
        self.step.append(step)


@dataclass
class RunRecord:
    """Measurements of one run, valid after every step, so that an interrupted run can be reported too.

    ``training`` holds the times of the run itself, ``alternating`` those of extra steps that took turns with the
    other runs': only these are fair when something else keeps the machine busy for a while.
    """

    name: str
    options: dict[str, Any] | None = None
    train_loss: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss on a sample of the test text)
    held_out_sums: list[list[float]] = field(default_factory=list)  # of these, where known: each text's loss, summed
    final: float | None = None  # loss on the whole test text after the last step
    training: StepTimes = field(default_factory=StepTimes)
    alternating: StepTimes = field(default_factory=StepTimes)
    compiled_in: StepTimes | None = None  # steps of another run of the same model, the first of which compiled it
    metrics: dict[str, Any] | None = None
    peak_memory_mb: float | None = None

    @property
    def steps(self) -> int:
        return len(self.train_loss)

    def typical(self, part: Literal["forward", "backward", "step"]) -> float | None:
        """Median seconds, of the alternating steps if there are any, else of the run's own; None without any."""
        times = getattr(self.alternating, part) or getattr(self.training, part)[WARMUP:]
        return median(times) if times else None

    def seconds(self, steps: int) -> float | None:
        """Training time of so many typical steps: no compilation, and no disturbance by other programs."""
        step = self.typical("step")
        return None if step is None else steps * step

    @property
    def compile_s(self) -> float | None:
        """What the first steps took beyond a median step's time."""
        times = (self.compiled_in or self.training).step
        return sum(times[:WARMUP]) - WARMUP * median(times[WARMUP:]) if len(times) > WARMUP else None

    def curve(self) -> tuple[list[float], list[float]]:
        """Held-out loss over training seconds."""
        points = [(self.seconds(steps), loss) for steps, loss in self.held_out]
        known = [(time, loss) for time, loss in points if time is not None]
        return [time for time, _ in known], [loss for _, loss in known]

    def loss_at(self, seconds: float) -> float | None:
        """Held-out loss after so much training time, interpolated between evaluations."""
        times, losses = self.curve()
        return float(np.interp(seconds, times, losses)) if times and times[-1] >= seconds else None


def equal_seconds(records: list[RunRecord]) -> float | None:
    """Training time that every run reached: where they can be compared at equal cost."""
    ends = [times[-1] for times, _ in (record.curve() for record in records) if len(times) > 1]
    return min(ends) if len(ends) == len(records) > 1 else None


def figures(title: str, records: list[RunRecord], rows: Rows) -> Table:
    """A table with a column for each run."""
    result = Table(title=title, title_justify="left")
    result.add_column("")
    for record in records:
        result.add_column(record.name, justify="right")
    for name, form, values in rows:
        result.add_row(name, *("–" if value is None else form.format(value) for value in values))
    return result


def picture(records: list[RunRecord], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, (by_step, by_time) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for record in records:
        if record.held_out:
            by_step.plot(*zip(*record.held_out, strict=True), marker="o", markersize=3, label=record.name)
        times, losses = record.curve()
        by_time.plot(times, losses, marker="o", markersize=3, label=record.name)
    by_step.set(xlabel="steps", ylabel="held-out loss (nats per token)", title="Equal steps")
    by_time.set(xlabel="training seconds, without compilation", title="Equal time")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
    by_step.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def save(records: list[RunRecord], setup: dict[str, Any], verdict: list[str], path: Path) -> None:
    """Everything measured so far, as JSON; ``path`` is replaced at once, never half written."""
    runs = []
    for record in records:
        summary = {
            "steps": record.steps,
            "seconds": record.seconds(record.steps),
            "compile_s": record.compile_s,
            "median_step_s": record.typical("step"),
            "median_forward_s": record.typical("forward"),
            "median_backward_s": record.typical("backward"),
        }
        runs.append({**asdict(record), "summary": summary})
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps({**setup, "runs": runs, "verdict": verdict}, indent=1, default=str))
    draft.replace(path)


def report(
    records: list[RunRecord], setup: dict[str, Any], table: Table, verdict: list[str], out: Path, console: Console
) -> None:
    """Write results.json, report.txt and loss.png, and print the table and the verdict."""
    save(records, setup, verdict, out / "results.json")
    picture(records, out / "loss.png")
    with (out / "report.txt").open("w", encoding="utf-8") as file:
        for target in (console, Console(file=file, width=120)):
            target.print(table)
            for line in verdict:
                target.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)
