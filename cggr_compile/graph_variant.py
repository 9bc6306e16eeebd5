"""A captured graph as the semantic passes left it, for one ratio."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule

from cggr_compile import compat
from cggr_compile.captured_reference import CapturedReference
from cggr_compile.configuration import Configuration
from cggr_compile.graph_dump import GraphDump
from cggr_compile.passes.base import FirstBatches, GraphContext
from cggr_compile.passes.facts import Figures, Slots, StaticSizes
from cggr_compile.passes.step_interface import Form
from cggr_compile.pipeline import rewrite
from cggr_compile.report import GraphReport


@dataclass
class GraphVariant:
    """One captured graph at one ratio.

    Attributes:
        graph: rewritten, or the captured one itself.
        ctx: what the passes found.
        training: whether it is a training step's.
        selective: whether it trains on selected positions.
        returns: what it returns behind the user's results.
        static: set if its sizes are numbers now.
        captured: the graph before the passes, if it is to be verified.
    """

    configuration: Configuration
    graph: GraphModule
    ctx: GraphContext
    report: GraphReport
    dump: GraphDump
    training: bool
    selective: bool
    returns: Form
    static: StaticSizes | None
    captured: CapturedReference | None

    @classmethod
    def of(
        cls,
        gm: GraphModule,
        inputs: Sequence[Any],
        configuration: Configuration,
        ratio: float,
        report: GraphReport,
        *,
        rewritable: bool,
        scheduled: bool,
        growth: int = 0,
        first_batch: FirstBatches | None = None,
        dumped: bool = True,
    ) -> GraphVariant:
        """Rewrite ``gm`` for a ratio, if it is ``rewritable``. ``gm`` stays as it is.

        Args:
            scheduled: whether there are other ratios.
            growth: how often slots that are measured on the first batch are doubled.
            first_batch: see :class:`GraphContext`.
            dumped: whether the graphs are written where the options and CGGR_DUMP_DIR say.
        """
        options = configuration.options
        folder = options.dump_dir or os.environ.get("CGGR_DUMP_DIR") or None
        dump = GraphDump(folder if dumped else None, report)
        ctx = GraphContext(
            replace(options, min_tokens_ratio=ratio),
            list(inputs),
            compat.capture_fake_mode(gm),
            configuration.pays_launches,
            scheduled,
            growth,
            first_batch,
            measured=options.min_tokens_ratio == "auto",
        )
        dump.stage("captured", gm)
        graph = rewrite(gm, ctx, report, dump) if rewritable else gm
        selective = report.matched
        captured = CapturedReference(gm, graph, inputs, ctx) if options.verify and selective else None
        static, figures = (ctx.get(StaticSizes), ctx.get(Figures)) if graph is not gm else (None, None)
        returns = Form() if figures is None else figures.form
        return cls(configuration, graph, ctx, report, dump, report.training, selective, returns, static, captured)

    @property
    def doublings(self) -> int:
        """How often its slots may be doubled, with ``growth`` of another variant."""
        return max((slots.doublings for slots in self.ctx.every(Slots)), default=0) if self.selective else 0

    def pin_sizes(self) -> None:
        """Let Dynamo guard the sizes that have become numbers."""
        for size in self.static.sizes if self.static is not None else ():
            compat.pin_size(size)
