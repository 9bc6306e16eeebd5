"""The table of finetune_quality.py."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from rich.table import Table


def table(document: dict[str, Any]) -> Table:
    """An arm a row; runs at the arm's best learning rate only."""
    found = Table(title=document["machine"]["device"])
    for name in ("arm", "learning rate", "step ms", "step ×", "loss, equal steps", "answers", "steps, equal time"):
        found.add_column(name, justify="left" if name == "arm" else "right")
    for name in ("loss, equal time", "answers"):
        found.add_column(name, justify="right")
    steps = [facts.get("step_s") for facts in document["arms"].values()]
    control = steps[0] if steps else None
    for arm, facts in document["arms"].items():
        step = facts.get("step_s")
        runs = [run for run in document["runs"] if run["arm"] == arm and run["lr"] == facts.get("lr")]
        by_steps, by_time = ([run for run in runs if run["equal"] == equal] for equal in ("steps", "time"))
        found.add_row(
            arm,
            f"{facts['lr']:g}" if "lr" in facts else "–",
            f"{1e3 * step:.1f}" if step else "–",
            f"{control / step:.2f}" if step and control else "–",
            losses(by_steps),
            answers(by_steps),
            str(by_time[0]["steps"]) if by_time else "–",
            losses(by_time),
            answers(by_time),
        )
    return found


def losses(runs: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, a seed counted once."""
    values = list({run["seed"]: run["loss"] for run in runs}.values())
    if not values:
        return "–"
    spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{spread} ({len(values)})"


def answers(runs: list[dict[str, Any]]) -> str:
    values = [run["accuracy"] for run in runs if "accuracy" in run]
    return f"{mean(values):.1%}" if values else "–"
