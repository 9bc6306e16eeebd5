"""Results of the step benchmark: the JSON file, and tables made of one or more such files.

A document is ``{"machine": {...}, "results": [result]}``; a result is one shape: its sizes and, in ``arms``, for each
arm ``status`` ("ok"; "failed" or "unavailable" with the ``error``), medians and quartiles, and what is known about its
compilation. ``workload`` says what the shape does not: which tokens have a label, what is trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.markup import escape
from rich.table import Table
from timing import Sample

PARTS = ("forward", "backward", "step")
NONE = "–"


def summary(samples: Sequence[Sample], tokens: int) -> dict[str, Any]:
    """Medians and quartiles of the times in milliseconds, memory in MB, tokens per second."""
    times = {part: [getattr(sample, part) for sample in samples] for part in PARTS}
    found: dict[str, Any] = {
        part: {"median": median(values), "quartiles": quantiles(values, n=4) if len(values) > 1 else None}
        for part, values in times.items()
    }
    for name in ("peak_mb", "saved_mb"):
        known = [value for sample in samples if (value := getattr(sample, name)) is not None]
        found[name] = max(known) if known else None
    found["tokens_per_s"] = 1e3 * tokens / found["step"]["median"]
    found["samples"] = times
    return found


def save(document: dict[str, Any], path: Path) -> None:
    """Replaces ``path`` at once, never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(document, indent=1, default=str) + "\n")
    draft.replace(path)


def times_faster(result: dict[str, Any], baseline: str, arm: str, part: str) -> float | None:
    """``baseline`` over ``arm``, for times the median over the rounds; None where one of them is missing.

    Each round has its own ratio, so that a program that disturbs some of the rounds disturbs both sides of it.
    """
    there, here = value(result, baseline, part), value(result, arm, part)
    if not there or not here:
        return None
    if part not in PARTS:
        return there / here
    # an interrupted round may have the one and not the other
    pairs = zip(*(result["arms"][name]["samples"][part] for name in (baseline, arm)), strict=False)
    return float(median(before / after for before, after in pairs))


def value(result: dict[str, Any], arm: str, part: str) -> float | None:
    found = result["arms"].get(arm, {}).get(part)
    number: float | None = found["median"] if isinstance(found, dict) else found
    return number


def text(number: float | None, form: str) -> str:
    return NONE if number is None else form.format(number)


def title(result: dict[str, Any]) -> str:
    graphs = ", CUDA graphs" if result["cuda_graphs"] else ""
    layers = f", {result['layers']} layers" if result["shortened"] else ""
    alone = "" if result["rounds"] else ", NOT interleaved: times of the warm-up"
    alone += ", every arm in a process of its own" if result.get("turns") else ""
    workload = result["workload"] if "workload" in result else f"ratio {result['ratio']}"
    return f"{result['shape']}{layers}, {result['dtype']}, {workload}{graphs}{alone}"


def rich_table(result: dict[str, Any]) -> Table:
    table = Table(title=title(result), title_justify="left", caption_justify="left")
    table.add_column("arm", no_wrap=True)
    for name in ("fwd ms", "bwd ms", "step ms", "fwd ×", "bwd ×", "step ×", "× plain", "peak MB", "peak ×"):
        table.add_column(name, justify="right")
    for name in ("saved MB", "saved ×", "compile s", "tokens/s"):
        table.add_column(name, justify="right")
    table.add_column("loss", justify="right")
    notes = ["* partly from a cache"]
    for arm, record in result["arms"].items():
        if record["status"] != "ok":
            table.add_row(arm, *[NONE] * (len(table.columns) - 1))
            notes.append(f"{arm} {_reason(record)}")
            continue
        ratios = {part: times_faster(result, "fair", arm, part) for part in (*PARTS, "peak_mb", "saved_mb")}
        table.add_row(
            arm,
            *(text(value(result, arm, part), "{:.1f}") for part in PARTS),
            *(text(ratios[part], "{:.2f}") for part in PARTS),
            text(times_faster(result, "plain", arm, "step"), "{:.2f}"),
            text(record.get("peak_mb"), "{:.0f}"),
            text(ratios["peak_mb"], "{:.2f}"),
            text(record.get("saved_mb"), "{:.0f}"),
            text(ratios["saved_mb"], "{:.2f}"),
            text(record["compile_s"], "{:.1f}") + ("*" if record["compile_cached"] else ""),
            text(record.get("tokens_per_s"), "{:.0f}"),
            text(record.get("loss"), "{:.4f}"),
        )
    if "disagreement" in result:
        notes.append(f"the dense arms differ: {result['disagreement']}")
    table.caption = escape("\n".join(notes))
    return table


def _reason(record: dict[str, Any]) -> str:
    """Why an arm has no figures, in short; all of it is in the file."""
    lines = record.get("error", "").splitlines() or [""]
    return f"{record['status']}: {lines[0][:100]}"


def markdown(documents: Sequence[dict[str, Any]], *, more: bool = False) -> str:
    """One table over all the documents, for docs/benchmarks.md. Memory: on CUDA the peak, on the CPU what is kept.

    ``more``: also how many times less the forward keeps for the backward, and tokens a second.

    Raises:
        ValueError: for results of a rehearsal: shortened models, no rounds.
    """
    header = ["shape", "arm", "forward ms", "backward ms", "step ms", "backward ×", "step ×", "memory MB", "memory ×"]
    header += ["saved ×", "tokens/s"] if more else []
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for result in (result for document in documents for result in document["results"]):
        if result["shortened"] or not result["rounds"]:
            raise ValueError(f"not a result to publish: {title(result)}")
        memory = "saved_mb" if result["device"] == "cpu" else "peak_mb"
        for arm, record in result["arms"].items():
            cells = [_reason(record), *[NONE] * (len(header) - 3)]
            if record["status"] == "ok":
                cells = [text(value(result, arm, part), "{:.1f}") for part in PARTS]
                cells += [text(times_faster(result, "fair", arm, part), "{:.2f}") for part in PARTS[1:]]
                cells += [text(record[memory], "{:.0f}"), text(times_faster(result, "fair", arm, memory), "{:.2f}")]
                if more:
                    saved = text(times_faster(result, "fair", arm, "saved_mb"), "{:.2f}")
                    cells += [saved, text(record["tokens_per_s"], "{:.0f}")]
            lines.append(f"| {_label(result)} | {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _label(result: dict[str, Any]) -> str:
    workload = f", {result['workload']}" if "workload" in result else ""
    return str(result["shape"]) + workload + (" (CUDA graphs)" if result["cuda_graphs"] else "")


def machine_line(machine: dict[str, Any]) -> str:
    return ", ".join(str(machine[key]) for key in ("device", "threads", "torch", "triton", "transformers", "date"))
