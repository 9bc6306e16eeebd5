"""The report on the runs from random weights: a table, and a verdict in words."""

from __future__ import annotations

from comparison import Rows, RunRecord, equal_seconds, figures
from rich.table import Table


def table(records: list[RunRecord]) -> Table:
    budget = equal_seconds(records)
    dense = {"token_ratio": 1.0}
    ratios = [(dense if record.options is None else record.metrics or {}).get("token_ratio") for record in records]
    last = [record.held_out[-1] if record.held_out else (None, None) for record in records]
    rows: Rows = [
        ("steps", "{:.0f}", [record.steps for record in records]),
        ("tokens in the loss", "{:.0%}", ratios),
    ]
    if any(record.final is None for record in records):
        rows.append(("last evaluated at step", "{:.0f}", [step for step, _ in last]))
    rows += [
        ("held-out loss, whole text", "{:.3f}", [record.final for record in records]),
        ("held-out loss, sample", "{:.3f}", [loss for _, loss in last]),
    ]
    if budget is not None:
        rows.append((f"the same after {budget:.1f} s", "{:.3f}", [record.loss_at(budget) for record in records]))
    rows += [
        ("seconds (steps × median step)", "{:.1f}", [record.seconds(record.steps) for record in records]),
        ("step s, median", "{:.4f}", [record.typical("step") for record in records]),
        ("forward s, median", "{:.4f}", [record.typical("forward") for record in records]),
        ("backward s, median", "{:.4f}", [record.typical("backward") for record in records]),
        ("compile s, training graph", "{:.1f}", [record.compile_s for record in records]),
    ]
    if any(record.peak_memory_mb for record in records):
        rows.append(("peak memory MB", "{:.0f}", [record.peak_memory_mb for record in records]))
    return figures("Held-out loss: nats per token, over all tokens of the test text", records, rows)


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


def _better(dense: RunRecord, there: float, here: float) -> str:
    if abs(here - there) < 0.0005:
        return f"no difference, {here:.3f}"
    word = "worse" if here > there else "better"
    return f"{here:.3f} against {there:.3f}, {word} than {dense.name} by {abs(here - there):.3f}"
