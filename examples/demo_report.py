"""The report on the demo's runs: a table, and a verdict in words that follows from the figures."""

from __future__ import annotations

from math import sqrt
from typing import Any

from comparison import RunRecord, figures
from rich.table import Table

NOISE = 2.0  # standard errors: a smaller difference says nothing
SAME = 0.03  # share of a step's time: a smaller difference is none


def table(records: list[RunRecord], setup: dict[str, Any]) -> Table:
    """``setup``: "positions" of a batch."""
    equal = equal_steps(records)
    last = [record.held_out[-1] for record in records]
    seconds = [record.seconds(step) for record, (step, _) in zip(records, last, strict=True)]
    return figures(
        "Held-out loss: nats per token of the answers",
        records,
        [
            ("positions with gradient", "{:.0%}", [gradient_share(record, setup["positions"]) for record in records]),
            ("s a step, median", "{:.3f}", [record.typical("step") for record in records]),
            ("  of it forward", "{:.3f}", [record.typical("forward") for record in records]),
            ("  of it backward", "{:.3f}", [record.typical("backward") for record in records]),
            ("s to compile, apart", "{:.1f}", [record.compile_s for record in records]),
            ("held-out loss before", "{:.3f}", [record.held_out[0][1] for record in records]),
            (f"equal steps: after {equal}", "{:.3f}", [dict(record.held_out)[equal] for record in records]),
            ("steps in all", "{:.0f}", [step for step, _ in last]),
            ("s of these steps", "{:.1f}", seconds),
            ("held-out loss after them", "{:.3f}", [loss for _, loss in last]),
        ],
    )


def equal_steps(records: list[RunRecord]) -> int:
    """The last step after which every run was evaluated."""
    return max(set.intersection(*({step for step, _ in record.held_out} for record in records)))


def gradient_share(record: RunRecord, positions: int) -> float | None:
    """The share of a batch's positions that carried gradient in the last step that the record knows of."""
    if record.options is None:
        return 1.0
    rows = None if record.metrics is None else record.metrics["gradient_tokens"]
    return None if rows is None else float(rows / positions)


def difference(one: RunRecord, step: int, other: RunRecord, other_step: int, labels: list[int]) -> tuple[float, float]:
    """How much higher the held-out loss of ``one`` is, and the standard error of that over the problems.

    ``labels``: tokens of each problem's answer.
    """
    sums, other_sums = _sums(one, step), _sums(other, other_step)
    excess = [here - there for here, there in zip(sums, other_sums, strict=True)]
    mean = sum(excess) / sum(labels)
    spread = sum((more - mean * count) ** 2 for more, count in zip(excess, labels, strict=True))
    return mean, sqrt(spread * len(labels) / (len(labels) - 1)) / sum(labels)


def _sums(record: RunRecord, step: int) -> list[float]:
    return record.held_out_sums[[done for done, _ in record.held_out].index(step)]


def verdict(records: list[RunRecord], setup: dict[str, Any]) -> list[str]:
    """Sentences about the step's time, equal steps, equal time and the control, and the one that they come to.

    ``setup``: "held_out_labels", the answers' tokens of every held-out problem; "equal_time", whether the runs came to
    the end.
    """
    named = {record.name: record for record in records}
    dense, ours = named.get("dense"), named.get("cggr")
    step, step_ours = (None if run is None else run.typical("step") for run in (dense, ours))
    if dense is None or ours is None or step is None or step_ours is None:
        return ["Too few steps were made to compare anything."]
    if ours.metrics is not None and not ours.metrics["matched"]:
        return [f"The graph was NOT rewritten ({ours.metrics['fallback_reason']}): cggr trained densely, too."]
    labels, speed = setup["held_out_labels"], step / step_ours
    equal = equal_steps(records)

    lines = [f"A step took {step_ours:.2f} s against {step:.2f} s dense: {speed:.1f} times as fast."]
    at_steps = difference(ours, equal, dense, equal, labels)
    lines.append(f"After {equal} steps each: {_compared(ours, equal, dense, equal, at_steps)}.")
    at_time = None
    if setup["equal_time"]:
        rivals = [dense, named["dense, half batch"]]
        best = min(rivals, key=lambda rival: rival.held_out[-1][1])
        ends = ours.held_out[-1][0], best.held_out[-1][0]
        at_time = difference(ours, ends[0], best, ends[1], labels)
        took = ours.seconds(ends[0])
        lines.append(
            f"After {took:.0f} s of training each, {ends[0]} steps against {ends[1]}: "
            f"{_compared(ours, ends[0], best, ends[1], at_time)}, the better of the two dense runs."
        )
    control = named.get("random tokens")
    if control is not None:
        other = difference(ours, equal, control, equal, labels)
        lines.append(
            f"Beside as many tokens at random, {equal} steps: {_compared(ours, equal, control, equal, other)}."
        )
    return [*lines, _conclusion(speed, at_steps, at_time)]


def _compared(one: RunRecord, step: int, other: RunRecord, other_step: int, more: tuple[float, float]) -> str:
    loss, other_loss = dict(one.held_out)[step], dict(other.held_out)[other_step]
    difference, error = more
    word = "no more than noise" if abs(difference) <= NOISE * error else "lower" if difference < 0 else "higher"
    return f"held-out loss {loss:.3f} against {other_loss:.3f} ({other.name}), {difference:+.3f} ± {error:.3f}, {word}"


def _conclusion(speed: float, at_steps: tuple[float, float], at_time: tuple[float, float] | None) -> str:
    worse_steps = at_steps[0] > NOISE * at_steps[1]
    lower_time = at_time is not None and at_time[0] < -NOISE * at_time[1]
    higher_time = at_time is not None and at_time[0] > NOISE * at_time[1]
    if speed < 1 + SAME:
        return "Here it did not pay: the steps are no faster than dense ones."
    if not worse_steps and not higher_time:
        more = ", and a lower loss than dense training of the same time" if lower_time else ""
        return f"Here it paid: what dense steps learn, {speed:.1f} times as fast{more}."
    if lower_time:
        return f"Here it paid in time: a step learns less than a dense one, but takes {1 / speed:.0%} of its time."
    return f"Here it did not pay: steps are {speed:.1f} times as fast, but dense training learned more."
