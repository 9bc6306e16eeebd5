"""One HTML page of what the backend does: graphs, layers, passes, the selection over the text, a run's metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cggr_compile.charts import histogram, line_chart
from cggr_compile.graph_diff import diff_texts
from cggr_compile.report import delta_text

if TYPE_CHECKING:
    from cggr_compile.cost.step import Cost

DIFF_LINES = 400  # shown of what a pass changed
BINS = 30


def graph_section(report: Mapping[str, Any], stages: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What the page shows of one graph.

    Args:
        report: :meth:`GraphReport.as_dict`. stages: names (``07_select_rows``) and texts of its dump, in order.
    """
    records = {record["name"]: record for record in report["passes"]}
    diffs = {}
    for (before, old), (after, new) in pairwise(stages):
        lines = diff_texts(old, new, before, after)
        if (name := after.split("_", 1)[1].removeprefix("joint_")) in records:
            diffs[name] = {"lines": lines[2 : DIFF_LINES + 2], "more": max(0, len(lines) - DIFF_LINES - 2)}
    passes = [
        {**record, "delta": delta_text(record["added"], record["removed"]), "diff": diffs.get(name)}
        for name, record in records.items()
    ]
    return {**report, "passes": passes, "layers": _layers(report, records), "stages": _whole(stages)}


def selection_section(
    view: Mapping[str, Any], ids: list[list[int]] | None, decode: Callable[[list[int]], str] | None
) -> dict[str, Any]:
    """What the page shows of a selection (:class:`SelectionView` as a dict) in a batch of tokens."""
    text = decode or (lambda ids: str(ids[0]))
    shape = view["candidate"]
    tokens = [[text([one]) for one in row] for row in ids] if ids else [["·" for _ in row] for row in shape]
    sequences = []
    for b, candidates in enumerate(shape):
        score = view["score"][b] if view["score"] is not None else [None] * len(candidates)
        columns = zip(
            *(tokens[b], score, candidates, view["selected"][b], view["gradient"][b], view["weight"][b]), strict=True
        )
        sequences.append([_token(*column) for column in columns])
    scores = [token["score"] for row in sequences for token in row if token["candidate"] and token["score"] is not None]
    counts = {kind: sum(token[kind] for row in sequences for token in row) for kind in ("candidate", "loss", "context")}
    chosen = [token["score"] for row in sequences for token in row if token["loss"] and token["score"] is not None]
    chart = histogram({"all candidates": scores, "selected": chosen}, BINS) if scores else ""
    total = sum(map(len, sequences))
    return {"sequences": sequences, "counts": counts, "positions": total, "histogram": chart, "scored": bool(scores)}


def cost_section(cost: Cost) -> dict[str, Any]:
    """What the page shows of what a training step costs."""
    from cggr_compile.cost.text import legend, lines, times

    return {"lines": lines(cost), "legend": legend(cost), "times": times(cost)}


def metrics_section(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Charts of a run's metrics, given as a trainer or :class:`MetricsLogger` logs them."""
    charts = []
    for title, names in (
        ("loss", ("loss", "eval_loss")),
        ("ratio", ("cggr/ratio", "cggr/token_ratio")),
        ("overflow", ("cggr/labels_overflow", "cggr/context_overflow", "cggr/top_entropy_overflow")),
        ("router", ("cggr/avg_confidence", "cggr/avg_entropy")),
    ):
        series = {}
        for name in names:
            points = [(_step(values, i), values[name]) for i, values in enumerate(steps, 1) if _is_number(values, name)]
            if points:
                series[name.removeprefix("cggr/")] = points
        if series:
            charts.append({"title": title, "svg": line_chart(series)})
    return charts


def write_page(
    path: str | Path,
    *,
    graphs: Sequence[Mapping[str, Any]] = (),
    selection: Mapping[str, Any] | None = None,
    cost: Mapping[str, Any] | None = None,
    metrics: Sequence[Mapping[str, str]] = (),
    title: str = "cggr_compile report",
) -> Path:
    """Write the page of these sections."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("cggr_compile"), autoescape=True, undefined=StrictUndefined)
    template = environment.get_template("report.html.j2")
    # inside of a script element only "<" could end it
    data = json.dumps(selection["sequences"] if selection else []).replace("<", "\\u003c")
    page = template.render(title=title, graphs=graphs, selection=selection, cost=cost, metrics=metrics, data=data)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def _token(
    text: str, score: float | None, candidate: bool, loss: bool, gradient: bool, weight: float
) -> dict[str, Any]:
    context = gradient and not loss
    rounded = None if score is None else round(score, 4)
    return {
        "text": text,
        "score": rounded,
        "candidate": candidate,
        "loss": loss,
        "context": context,
        "weight": round(weight, 3),
    }


def _layers(report: Mapping[str, Any], records: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The layers with what keeps a dense backward in each."""
    found = records.get("find_stack", {}).get("details", {})
    blocks = found.get("blocks") or []
    dense_at = records.get("row_sparse", {}).get("details", {}).get("densified_at", {})
    layers = []
    for block in blocks:
        name = block["name"]
        inside = [
            operator
            for operator, places in dense_at.items()
            if any(place is not None and (place == name or place.startswith(f"{name}.")) for place in places)
        ]
        kind = "dense" if report["level"] != "routed" else "partly" if inside else "routed"
        layers.append({"name": name, "mixes": " and ".join(block["mixes"]), "dense": inside, "kind": kind})
    return layers


def _whole(stages: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """The stages that are shown as a whole: what was captured, what became of it, the last joint graph."""
    wanted = [stage for stage in stages if stage[0].split("_", 1)[1] in ("captured", "rewritten")]
    if stages and stages[-1] not in wanted:
        wanted.append(stages[-1])
    return [{"name": name, "text": text} for name, text in wanted]


def _step(values: Mapping[str, Any], otherwise: int) -> float:
    return float(values.get("step", values.get("cggr/step", otherwise)))


def _is_number(values: Mapping[str, Any], name: str) -> bool:
    return isinstance(values.get(name), (int, float))
