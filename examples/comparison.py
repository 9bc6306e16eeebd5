"""What was measured, and how it is shown: one record per run, a table, a picture, a verdict in words, a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

WARMUP = 3  # steps that may compile: kept out of every time below


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
    final: float | None = None  # loss on the whole test text after the last step
    training: StepTimes = field(default_factory=StepTimes)
    alternating: StepTimes = field(default_factory=StepTimes)
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
        times = self.training.step
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


def table(records: list[RunRecord]) -> Table:
    budget = equal_seconds(records)
    result = Table(title="Held-out loss: nats per token, over all tokens of the test text", title_justify="left")
    result.add_column("")
    for record in records:
        result.add_column(record.name, justify="right")

    def row(title: str, form: str, values: list[float | None], missing: str = "–", scale: float = 1.0) -> None:
        result.add_row(title, *(missing if value is None else form.format(scale * value) for value in values))

    row("steps", "{:.0f}", [record.steps for record in records])
    dense = {"token_ratio": 1.0}
    ratios = [(dense if record.options is None else record.metrics or {}).get("token_ratio") for record in records]
    row("tokens in the loss", "{:.0%}", ratios)
    last = [record.held_out[-1] if record.held_out else (None, None) for record in records]
    if any(record.final is None for record in records):
        row("last evaluated at step", "{:.0f}", [step for step, _ in last])
    row("held-out loss, whole text", "{:.3f}", [record.final for record in records])
    row("held-out loss, sample", "{:.3f}", [loss for _, loss in last])
    if budget is not None:
        row(f"the same after {budget:.1f} s", "{:.3f}", [record.loss_at(budget) for record in records])
    row("seconds (steps × median step)", "{:.1f}", [record.seconds(record.steps) for record in records])
    row("step ms, median", "{:.1f}", [record.typical("step") for record in records], scale=1000)
    row("forward ms, median", "{:.1f}", [record.typical("forward") for record in records], scale=1000)
    row("backward ms, median", "{:.1f}", [record.typical("backward") for record in records], scale=1000)
    row("compile s, training graph", "{:.1f}", [record.compile_s for record in records])
    if any(record.peak_memory_mb for record in records):
        row("peak memory MB", "{:.0f}", [record.peak_memory_mb for record in records])
    return result


def verdict(records: list[RunRecord]) -> list[str]:
    """Plain sentences about every later run against the first one (the dense one)."""
    dense, budget = records[0], equal_seconds(records)
    lines = []
    for record in records[1:]:
        if record.metrics is not None and not record.metrics.get("matched"):
            lines.append(f"{record.name}: the graph was NOT rewritten ({record.metrics.get('fallback_reason')}).")
            continue
        if dense.final is not None and record.final is not None and dense.steps == record.steps:
            lines.append(f"{record.name}, equal steps: {_better(dense, dense.final, record.final)}.")
        if budget is not None:
            at_dense, at_record = dense.loss_at(budget), record.loss_at(budget)
            if at_dense is not None and at_record is not None:
                lines.append(f"{record.name}, equal seconds ({budget:.1f}): {_better(dense, at_dense, at_record)}.")
        here, there = record.typical("step"), dense.typical("step")
        if here and there:
            word = "about the same" if 0.97 < here / there < 1.03 else "slower" if here > there else "faster"
            lines.append(
                f"{record.name}: a step takes {here / there:.2f} times as long as a {dense.name} one ({word})."
            )
    if len(records) > 1 and not all(record.alternating.step for record in records):
        lines.append(
            "The times come from runs made one after the other: another program may have disturbed one of them."
        )
    if lines:
        lines.append("One seed each: small differences mean nothing. Longer runs and other sizes may differ.")
    return lines


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


def save(records: list[RunRecord], setup: dict[str, Any], path: Path) -> None:
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
    draft.write_text(json.dumps({**setup, "runs": runs, "verdict": verdict(records)}, indent=1, default=str))
    draft.replace(path)


def report(records: list[RunRecord], setup: dict[str, Any], out: Path, console: Console) -> None:
    """Write results.json, report.txt and loss.png, and print the table and the verdict."""
    save(records, setup, out / "results.json")
    picture(records, out / "loss.png")
    with (out / "report.txt").open("w", encoding="utf-8") as file:
        for target in (console, Console(file=file, width=120)):
            target.print(table(records))
            for line in verdict(records):
                target.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)


def _better(dense: RunRecord, there: float, here: float) -> str:
    if abs(here - there) < 0.0005:
        return f"no difference, {here:.3f}"
    word = "worse" if here > there else "better"
    return f"{here:.3f} against {there:.3f}, {word} than {dense.name} by {abs(here - there):.3f}"
