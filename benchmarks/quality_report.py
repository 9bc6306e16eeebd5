"""Table and plot of what quality.py has measured so far."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from quality_arms import CONTROLS
from rich.table import Table

Results = list[dict[str, Any]]


def groups(results: Results) -> Iterator[tuple[str, int, dict[str, Results]]]:
    """Regime, tokens a step, and the finished runs of every arm, without the learning-rate sweep."""
    for regime, batch in dict.fromkeys((r["regime"], r["batch"]) for r in results):
        here = [r for r in results if (r["regime"], r["batch"]) == (regime, batch)]
        arms = {
            arm: [r for r in here if r["arm"] == arm and not r["sweep"]]
            for arm in dict.fromkeys(r["arm"] for r in here)
        }
        yield regime, batch, arms


def swept(results: Results, regime: str, batch: int, arm: str) -> dict[float, float]:
    """Learning rate to held-out loss at the end of its short run; a run that diverged counts as infinitely bad."""
    found = {}
    for r in results:
        if r["sweep"] and r["status"] == "ok" and (r["regime"], r["batch"], r["arm"]) == (regime, batch, arm):
            found[r["lr"]] = r["final"] if r["final"] == r["final"] else float("inf")
    return found


def finals(runs: Results) -> list[float]:
    return [r["final"] for r in runs if r["status"] == "ok"]


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over the seeds."""
    if not values:
        return "–"
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "") + f" ({len(values)})"


def difference(runs: Results, control: Results) -> str:
    """Of the mean held-out losses; below zero the arm is better."""
    ours, theirs = finals(runs), finals(control)
    return f"{mean(ours) - mean(theirs):+.3f}" if ours and theirs else "–"


def tables(results: Results) -> list[Table]:
    """One for each regime and batch: held-out loss over all tokens at the end, in nats."""
    made = []
    for regime, batch, arms in groups(results):
        table = Table(title=f"{regime}, {batch} tokens a step", title_justify="left")
        for name in ("arm", "learning rate", "seconds", "steps", "ms/step", "M tokens", "held-out loss (seeds)"):
            table.add_column(name, justify="left" if name == "arm" else "right")
        for control in CONTROLS:
            table.add_column(f"− {control}", justify="right")
        for arm, runs in arms.items():
            good = [r for r in runs if r["status"] == "ok"]
            failed = next((r for r in results if r["status"] != "ok" and r["arm"] == arm and r["batch"] == batch), None)
            sweep = swept(results, regime, batch, arm)
            if not good:
                tried = ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in sweep.items())
                table.add_row(arm, f"failed: {failed['error']}"[:80] if failed else f"so far only the sweep: {tried}")
                continue
            rates = {r["lr"] for r in good}
            edge = "!" if len(sweep) > 1 and rates & {min(sweep), max(sweep)} else ""
            seconds, steps = mean(r["seconds"] for r in good), mean(r["steps"] for r in good)
            table.add_row(
                arm,
                "/".join(f"{lr:g}" for lr in sorted(rates)) + edge,
                f"{seconds:.2f}",
                f"{steps:.0f}",
                f"{1e3 * seconds / steps:.2f}",
                f"{mean(r['tokens'] for r in good) / 1e6:.2f}",
                spread(finals(good)),
                *(difference(good, arms.get(control, [])) for control in CONTROLS),
            )
        table.caption = "! the best rate of the sweep is at its end; below zero is better than the control"
        table.caption_justify = "left"
        made.append(table)
    return made


def plot(results: Results, path: Path) -> None:
    """Held-out loss against measured seconds, a panel for each regime and batch; dense controls in black and grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(r, b, {a: runs for a, runs in arms.items() if finals(runs)}) for r, b, arms in groups(results)]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), 5), squeeze=False)
    for axis, (regime, batch, arms) in zip(axes[0], panels, strict=True):
        for arm, runs in arms.items():
            curves = [r["curve"][1:] for r in runs if r["status"] == "ok"]
            points = list(zip(*curves, strict=False))
            seconds = [mean(point[0] for point in at) for at in points]
            losses = [mean(point[2] for point in at) for at in points]
            style: dict[str, Any] = {"linewidth": 1.2, "marker": "."}
            if arm in CONTROLS:
                style = {"linewidth": 2, "color": "black", "linestyle": ("-", "--", ":")[CONTROLS.index(arm)]}
            axis.plot(seconds, losses, label=f"{arm} ({spread(finals(runs))})", **style)
        axis.set(title=f"{regime}, {batch} tokens a step", xlabel="measured seconds of training")
        axis.set_ylabel("held-out loss over all tokens, nats")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
