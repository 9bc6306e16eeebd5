"""What the samples of distributed.py say, and its one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from results import NONE, text
from rich.markup import escape
from rich.table import Table

COLUMNS = (
    "arm",
    "step ms",
    "× dense",
    "tokens/s",
    "peak MB",
    "scaling %",
    "reduction ms",
    "exposed ms",
    "hidden %",
    "on paper ms",
)


def figures(samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians in milliseconds. ``exposed``: what the reduction of the gradients adds to forward and backward, within a
    round; ``hidden``: the share of its own time that it does not add."""
    found: dict[str, Any] = {name: median(values) for name, values in samples.items()}
    if "reduced" in samples:
        pairs = zip(samples["reduced"], samples["unreduced"], strict=True)
        found["exposed"] = median(on - off for on, off in pairs)
        found["hidden"] = 1.0 - found["exposed"] / found["reduction"] if found["reduction"] else None
    return found


def scaling(result: Mapping[str, Any], label: str) -> float | None:
    """The step without other processes over the step with them: 1 where they cost nothing.

    Against the selective step of the same ratio, or the dense one.
    """
    record = result["arms"][label]
    for other in result["arms"].values():
        alone = other["status"] == "ok" and other["arm"] == ("alone-dense" if record["ratio"] is None else "alone")
        if alone and other["ratio"] == record["ratio"] and "step" in other:
            return float(other["step"] / record["step"])
    return None


def times_faster(result: Mapping[str, Any], label: str) -> float | None:
    """The fastest dense arm with as many processes over this one."""
    alone = result["arms"][label]["arm"].startswith("alone")
    dense = [
        record["step"]
        for record in result["arms"].values()
        if record["status"] == "ok" and "step" in record and record["ratio"] is None
        if record["arm"].startswith("alone") == alone
    ]
    return min(dense) / result["arms"][label]["step"] if dense else None


def planned(result: Mapping[str, Any], label: str, cards: int, gbps: float) -> float | None:
    """The step in milliseconds on ``cards`` cards, each with a batch like this one, on paper; None without figures.

    What a card computes is the step without other processes. What it sends takes ``bytes * (cards - 1) / cards /
    bandwidth``: gradients once (a whole gradient is reduced, then spread: twice), gathered parameters once for each
    pass. Of that, the share is hidden that was hidden here, and never more than the computation takes: all of it
    without such a measurement, which is the least that the step can be.

    Args:
        gbps: what a card sends, in gigabytes a second.
    """
    record, share = result["arms"][label], scaling(result, label)
    if share is None or record["arm"].startswith("alone"):
        return None
    alone, sent = share * record["step"], record["sent"]
    whole = record["arm"].startswith("ddp")
    total = sent["reduced"] * (2 if whole else 1) + sent["gathered_forward"] + sent["gathered_backward"]
    communication = total * (cards - 1) / cards / gbps / 1e6
    hidden = record.get("hidden")
    hideable = communication * (1.0 if hidden is None else min(max(hidden, 0.0), 1.0))
    return float(alone + communication - min(hideable, alone))


def rich_table(result: Mapping[str, Any], cards: int = 64, gbps: float = 50.0) -> Table:
    """A row per arm; what one process does, and tokens a second of all. ``cards``, ``gbps``: see :func:`planned`."""
    layers = f", {result['layers']} layers" if result["layers"] else ""
    title = f"{result['shape']}{layers}, {result['dtype']}, {result['world']} processes, {result['rounds']} rounds"
    table = Table(title=title, title_justify="left", caption_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    notes = []
    for label, record in result["arms"].items():
        if record["status"] != "ok" or "step" not in record:
            table.add_row(label, *[NONE] * (len(COLUMNS) - 1))
            notes.append(
                f"{label} {record['status']}: {record.get('error', 'not measured').partition(chr(10))[0][:100]}"
            )
            continue
        together = 1 if record["arm"].startswith("alone") else result["world"]
        tokens = 1e3 * result["batch"] * result["length"] * together / record["step"]
        peak, hidden, efficiency = record["peak_mb"], record.get("hidden"), scaling(result, label)
        table.add_row(
            label,
            text(record["step"], "{:.1f}"),
            text(times_faster(result, label), "{:.2f}"),
            text(tokens, "{:.0f}"),
            text(None if peak is None else peak + record["held_mb"], "{:.0f}"),
            text(None if efficiency is None else 100 * efficiency, "{:.1f}"),
            text(record.get("reduction"), "{:.1f}"),
            text(record.get("exposed"), "{:.1f}"),
            text(None if hidden is None else 100 * hidden, "{:.0f}"),
            text(planned(result, label, cards, gbps), "{:.1f}"),
        )
    notes.append(f"on paper: {cards} cards that send {gbps:g} GB/s each (--cards, --gbps)")
    table.caption = escape("\n".join(notes))
    return table
