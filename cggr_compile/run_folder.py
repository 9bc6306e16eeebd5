"""``python -m cggr_compile report FOLDER``: a page of what a run has left there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cggr_compile.graph_dump import folder_of, read_stages
from cggr_compile.html_report import graph_section, metrics_section, selection_section, write_page


def report_run(folder: str | Path, out: str | Path, decode: Callable[[list[int]], str] | None = None) -> Path:
    """Write the page of a run's folder; returns its path.

    Of the folder, of ``graphs`` and of the newest ``checkpoint-N`` in it these files are read: ``report.json`` and the
    stages beside it (the option ``dump_dir``, :meth:`Explanation.save`), ``selection.json`` (:meth:`Explanation.save`),
    ``metrics.jsonl`` (:class:`MetricsLogger`), ``trainer_state.json`` (transformers' Trainer).

    Args:
        decode: makes text of token ids.

    Raises:
        ValueError: the folder has none of these, or one that cannot be read.
    """
    root = Path(folder)
    checkpoints = sorted(root.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    places = [root, root / "graphs", *checkpoints[-1:]]
    graphs = next((found for place in places if (found := _graphs(place))), [])
    selection = next((_read(file) for place in places if (file := place / "selection.json").is_file()), None)
    steps = next((found for place in places if (found := _steps(place))), [])
    if not (graphs or selection or steps):
        raise ValueError(
            f"run must be a folder with report.json, selection.json, metrics.jsonl or trainer_state.json, got {root}"
        )
    seen = None if selection is None else selection_section(selection, selection.pop("ids"), decode)
    return write_page(out, graphs=graphs, selection=seen, metrics=metrics_section(steps), title=f"{root.name}: report")


def _graphs(folder: Path) -> list[dict[str, Any]]:
    """Of every graph that was dumped into a folder; one that Explanation.save wrote lists all."""
    found = []
    for file in (folder / "report.json", *sorted(folder.glob("*/report.json"))):
        reports = _read(file) if file.is_file() else []
        for report in reports if isinstance(reports, list) else [reports]:
            if isinstance(report, dict) and "passes" in report:
                place = folder_of(folder, report["index"], report["training"])
                found.append((place, report))
    unique = dict(reversed(found))  # a list comes first, and says more
    return [graph_section(unique[place], read_stages(place)) for place in sorted(unique)]


def _steps(folder: Path) -> list[dict[str, Any]]:
    lines = folder / "metrics.jsonl"
    if lines.is_file():
        return [_parsed(line, lines) for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
    state = folder / "trainer_state.json"
    return list(_read(state).get("log_history", [])) if state.is_file() else []


def _read(path: Path) -> Any:
    return _parsed(path.read_text(encoding="utf-8"), path)


def _parsed(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"run: {path} is no JSON: {error}") from error
