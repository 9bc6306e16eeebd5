"""Where the collectives of a forward or backward graph stand: steps that Inductor takes as its last ones over ATen.

They change no value. Which collectives there are, and in which order, must be the same in every process, so nothing
here depends on a measurement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cggr_compile.passes.collectives.merge import merge_gathers, merge_reductions
from cggr_compile.passes.collectives.move import delay_waits, prefetch_gathers

if TYPE_CHECKING:
    from torch.fx import Graph


def schedule_collectives(graph: Graph) -> None:
    """Few collectives of what is small, and all of them beside the products that do not need them."""
    merge_gathers(graph)
    merge_reductions(graph)
    prefetch_gathers(graph)
    delay_waits(graph)
    graph.lint()
