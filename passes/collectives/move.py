"""Starts collectives early and waits for them late, so that they run beside products."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cggr_compile.passes.collectives.common import finishing, gathers, nbytes, reductions, wait_of
from cggr_compile.passes.fx import ancestors, in_order

if TYPE_CHECKING:
    from torch.fx import Graph, Node

# Bytes of full parameters that are gathered, or being gathered, before what reads them; and of gradients that are being
# reduced. Some products' time: a layer of a model with a billion parameters has 2**27 in bfloat16.
AHEAD = 2**28


def prefetch_gathers(graph: Graph) -> None:
    """Starts each gather where an earlier one is waited for: the last one, or as many as fit into ``AHEAD`` bytes.

    Before::

        a = wait(gather(x)); p = mm(h, a); b = wait(gather(y)); q = mm(p, b)

    After::

        started = gather(x); other = gather(y)
        a = wait(started); p = mm(h, a)                # y is gathered meanwhile
        b = wait(other); q = mm(p, b)
    """
    order = gathers(graph)
    waits = [wait_of(gather) for gather in order]
    begin, ahead = 0, 0  # those from begin on are gathered ahead of this one
    for i, gather in enumerate(order):
        ahead += nbytes(gather)
        while begin + 1 < i and ahead > AHEAD:
            ahead -= nbytes(order[begin])
            begin += 1
        if begin < i:
            for node in in_order(graph, ancestors([gather])):
                if node.op != "placeholder":
                    waits[begin].prepend(node)


def delay_waits(graph: Graph) -> None:
    """Waits for a reduced gradient where the next ones are started that do not fit into ``AHEAD`` bytes beside it.

    Before::

        dw = mm(dy, x); g = wait(reduce_scatter(dw)); dx = mm(dy, w); ...; return g

    After::

        dw = mm(dy, x); started = reduce_scatter(dw)
        dx = mm(dy, w); ...                            # dw is reduced meanwhile
        g = wait(started); return g
    """
    started: list[Node] = []
    running = 0
    for reduction in reductions(graph):
        running += nbytes(reduction.all_input_nodes[0])
        while started and running > AHEAD:
            oldest = started.pop(0)
            running -= nbytes(oldest.all_input_nodes[0])
            _finish(oldest, reduction)
        started.append(reduction)
    for reduction in started:
        _finish(reduction, graph.output_node())


def _finish(reduction: Node, before: Node) -> None:
    for node in finishing(reduction) or ():
        before.prepend(node)
