"""What ``explain`` has found: a table for people, files, a page."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cggr_compile.html_report import cost_section, graph_section, selection_section, write_page
from cggr_compile.report import GraphReport, delta_text

if TYPE_CHECKING:
    from cggr_compile.cost.step import Cost

LEVELS = ("routed", "loss", "dense")
_MATCHED = {True: "yes", False: "no", None: "?"}


class Explanation:
    """What ``explain`` returns: prints as a table.

    Attributes:
        graphs: a GraphReport per graph.
        level: how much is computed on selected positions, "routed", "loss" or "dense"; see :class:`GraphReport`.
        matched: whether a training graph trains on selected positions: whether the level is not "dense".
        reason: of the graph with the most of it, or of the first training graph.
        cause: why its level is not "routed", a :class:`cggr_compile.causes.Cause`; None if it is, or there is no graph.
        obstacle: the text of the cause, where the level is "loss".
        passes: the PassRecords of that graph.
        view: the selection of the call, where a graph trains on selected positions.
        ids: the batch of tokens, ``[B][S]`` in plain lists, that it was made in, if the call had one.
        stages: of every graph, names and texts of the graph after every pass, as far as it was dumped.
        cost: FLOPs, bytes and memory of the training step as expressions, a :class:`cggr_compile.cost.step.Cost`; None
            where no graph trains. Counted when it is first read, which captures the model once more.
    """

    def __init__(
        self,
        graphs: list[GraphReport],
        stages: list[list[tuple[str, str]]] | None = None,
        ids: list[list[int]] | None = None,
        count: Callable[[], Cost | None] = lambda: None,
    ) -> None:
        self.graphs, self.ids, self._count = graphs, ids, count
        self.stages = stages or [[] for _ in graphs]
        self.view = next((graph.view for graph in graphs if graph.view is not None), None)
        training = [g for g in graphs if g.training]
        chosen = min(training, key=lambda g: LEVELS.index(g.level), default=next(iter(graphs), None))
        self.level = chosen.level if chosen else "dense"
        self.matched = self.level != "dense"
        self.reason = chosen.reason if chosen else "the call compiled no graph"
        self.cause = chosen.cause if chosen else None
        self.obstacle = chosen.obstacle if chosen else ""
        self.passes = chosen.passes if chosen else []

    @cached_property
    def cost(self) -> Cost | None:
        return self._count()

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        console = Console(width=120, record=True, file=io.StringIO())
        for graph in self.graphs:
            title = f"graph {graph.index} · {'training' if graph.training else 'inference'} · {graph.compiler}"
            title += f" · ratio {graph.ratio:g}" if graph.training else ""
            title += " · not needed so far" if graph.waiting else ""
            table = Table(title=title, title_justify="left", caption=graph.reason, caption_justify="left")
            for column in ("pass", "stage", "matched", "what", "operators"):
                table.add_column(column, overflow="fold")
            for record in graph.passes:
                delta = delta_text(record.added, record.removed)
                table.add_row(record.name, record.stage, _MATCHED[record.matched], record.reason, delta)
            console.print(table)
            if graph.verification is not None:
                console.print(f"verified: {graph.verification}", markup=False)
        named = f"{self.cause.name}: " if self.cause is not None else ""
        why = f"{self.reason}; not routed: {named}{self.obstacle}" if self.obstacle else f"{named}{self.reason}"
        console.print(f"matched: {self.matched}, level: {self.level} ({why})", markup=False)
        return console.export_text()

    __repr__ = __str__

    def save(self, folder: str | Path) -> Path:
        """Write report.json and report.txt into ``folder`` (made if missing); returns the JSON's path.

        Where a selection was seen, selection.json too: the :class:`SelectionView`, and the ids of its tokens.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / "report.txt").write_text(str(self))
        path = target / "report.json"
        path.write_text(json.dumps([g.as_dict() for g in self.graphs], indent=2, default=str))
        if self.view is not None:
            (target / "selection.json").write_text(json.dumps({**self.view.as_dict(), "ids": self.ids}))
        return path

    def to_html(self, path: str | Path, decode: Callable[[list[int]], str] | None = None) -> Path:
        """Write one self-contained page; returns its path.

        It shows the levels, a strip of the layers with what stays dense in each, the passes with what each changed, the
        cost of the step, dense and selective, and the batch's tokens coloured by score, with marks for those that were
        selected, and for context.

        Args:
            decode: makes text of token ids, such as a tokenizer's ``decode``; without it ids are shown.
        """
        graphs = [graph_section(g.as_dict(), texts) for g, texts in zip(self.graphs, self.stages, strict=True)]
        seen = None if self.view is None else selection_section(self.view.as_dict(), self.ids, decode)
        cost = None if self.cost is None else cost_section(self.cost)
        return write_page(path, graphs=graphs, selection=seen, cost=cost)
