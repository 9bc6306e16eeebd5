"""Makes one collective of many small ones: the weights of norms, biases, adapters."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from cggr_compile import compat
from cggr_compile.passes.collectives.common import gathers, nbytes, reductions, wait_of
from cggr_compile.passes.fx import Emitter, ancestors, in_order
from cggr_compile.passes.nodes import fake_value, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.fx import Graph, Node

aten = torch.ops.aten
# Bytes of a full parameter from which on its collective takes longer than it takes to start. What is merged is copied
# before or behind the collective.
SMALL = 2**20
# Bytes of merged full parameters, which are there from the first one's use to the last one's.
MOST = 2**24


def merge_gathers(graph: Graph) -> None:
    """Gathers small parameters together, where the first of them is.

    Before::

        a = wait(all_gather(x, N, g)); ...; b = wait(all_gather(y, N, g))

    After::

        both = view(wait(all_gather(cat([x, y]), N, g)), [N, -1])     # x, y: flat
        a, b = both[:, :len(x)], both[:, len(x):]                     # reshaped
    """
    for group in _groups(gathers(graph), by=lambda node: (node.args[1:], fake_value(node).dtype)):
        emit = Emitter(graph, fake_value(group[0]).fake_mode, key="val")
        for node in in_order(graph, ancestors(group) - set(group)):
            if node.op != "placeholder":
                group[0].prepend(node)
        with emit.before(group[0], "merge_gathers"):
            size, name = group[0].args[1:]
            flat = [emit.call(aten.reshape.default, node.args[0], [-1]) for node in group]
            gathered = emit.call(compat.ALL_GATHER, emit.call(aten.cat.default, flat), size, name)
            table = emit.call(aten.reshape.default, emit.call(compat.WAIT, gathered), [size, -1])
            parts = _columns(emit, table, [fake_value(node).numel() // size for node in group])
            full = [_reshaped(emit, part, node) for part, node in zip(parts, group, strict=True)]
        _replace(graph, group, full)


def merge_reductions(graph: Graph) -> None:
    """Reduces small gradients together, where the last of them is; as :func:`merge_gathers`."""
    groups = _groups(reductions(graph), by=lambda node: (node.target, node.args[1:], fake_value(node).dtype))
    for group in groups:
        emit = Emitter(graph, fake_value(group[0]).fake_mode, key="val")
        with emit.before(group[-1], "merge_reductions"):
            parts = fake_value(group[0].args[0]).numel() // fake_value(group[0]).numel()  # 1: all are reduced alike
            rows = [emit.call(aten.reshape.default, node.args[0], [parts, -1]) for node in group]
            flat = emit.call(aten.reshape.default, emit.call(aten.cat.default, rows, 1), [-1])
            reduced = emit.call(compat.WAIT, emit.call(group[0].target, flat, *group[0].args[1:]))
            table = emit.call(aten.reshape.default, reduced, [1, -1])
            columns = _columns(emit, table, [fake_value(node).numel() for node in group])
            own = [_reshaped(emit, column, node) for column, node in zip(columns, group, strict=True)]
        _replace(graph, group, own)
    if groups:
        compat.sort_stably(graph)


def _groups(collectives: Iterable[Node], by: Any) -> list[list[Node]]:
    """Small collectives that can be one, two or more in each."""
    found: list[list[Node]] = []
    last: dict[Any, list[Node]] = {}
    total: dict[Any, int] = defaultdict(int)
    for node in collectives:
        size, kind = max(nbytes(node), nbytes(node.all_input_nodes[0])), by(node)
        if size > SMALL:
            continue
        if kind not in last or total[kind] + size > MOST:
            last[kind], total[kind] = [], 0
            found.append(last[kind])
        last[kind].append(node)
        total[kind] += size
    return [group for group in found if len(group) > 1]


def _columns(emit: Emitter, table: Node, widths: list[int]) -> list[Node]:
    ends = torch.tensor(widths).cumsum(0).tolist()
    return [emit.call(aten.slice.Tensor, table, 1, end - width, end) for width, end in zip(widths, ends, strict=True)]


def _reshaped(emit: Emitter, part: Node, like: Node) -> Node:
    return emit.call(aten.reshape.default, part, list(shape_of(like)))


def _replace(graph: Graph, collectives: list[Node], values: list[Node]) -> None:
    for node, value in zip(collectives, values, strict=True):
        wait = wait_of(node)
        wait.replace_all_uses_with(value)
        graph.erase_node(wait)
        graph.erase_node(node)
