"""The position-wise tail between the final states and the head: checked once, copied onto other rows."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.analysis.modes import cast_as, modes_of
from cggr_compile.passes.facts import FinalStates, Selection
from cggr_compile.passes.fx import Emitter, layout_only
from cggr_compile.passes.nodes import fake_value, op_name, same_size, shape_of
from cggr_compile.passes.patterns.head import token_slice
from cggr_compile.passes.patterns.row_wise import not_row_wise

if TYPE_CHECKING:
    from torch.fx import Node


def tail_start(tail: tuple[Node, ...], last: Node) -> int | str:
    """First position the tail keeps; or, as a string, why it does not work position by position."""
    between = "between the last block and the head"
    batch, length = shape_of(last)[:2]
    windows = {last: (0, length)}  # of each value: the first position that it has, and how many
    start = 0
    for node in tail:
        read = [windows[n] for n in node.all_input_nodes if n in windows]
        start, length = read[0] if read else (start, length)
        if any(begin != start or not same_size(size, length) for begin, size in read):
            return f"{node}, which reads positions of one place for another, {between}"
        if op_name(node) == "getitem" and (begin := token_slice(node)) is not None:
            start, length = start + begin, shape_of(node)[1]
        elif why := not_row_wise(node, windows):
            return f"{why} {between}"
        shape = shape_of(node)
        whole = len(shape) > 2 and same_size(shape[0], batch) and same_size(shape[1], length)
        flat = len(shape) == 2 and same_size(shape[0], batch * length)
        if shape and not whole and not flat:
            return f"{node}, whose shape {list(shape)} has no row per position, {between}"
        windows[node] = start, length
    return start


def copy_rows(emit: Emitter, nodes: Iterable[Node], rows: Mapping[Node, Node]) -> dict[Node, Node]:
    """Apply calls of the last block to rows [B, K, X], each copy beside its original, in whose modes it then runs.

    Args:
        nodes: row-wise, in order. rows: what stands for the values that they take rows of.

    Returns:
        Where each call's value now comes from.
    """
    mapping = dict(rows)
    like = next(iter(rows.values()))
    for node in nodes:
        with emit.before(node, "rewrite_loss"):
            if layout_only(node):
                (source,) = (n for n in node.all_input_nodes if n in mapping)
                mapping[node] = _with_rank(emit, mapping[source], like, len(shape_of(node)))
            else:
                mapping[node] = emit.copy(node, mapping)
    return {node: mapping[node] for node in nodes}


def _with_rank(emit: Emitter, rows: Node, like: Node, rank: int) -> Node:
    """Rows as [B, K, X] (``like`` is so) or [B * K, X]."""
    if len(shape_of(rows)) == rank:
        return rows
    if rank == 2:
        return emit.method("flatten", rows, 0, 1)
    return emit.method("reshape", rows, emit.size(like, 0), emit.size(like, 1), -1)


def copy_tail(
    emit: Emitter,
    final: FinalStates,
    source: Node,
    in_place: bool,
    replaced: Mapping[Node, Node] | None = None,
) -> dict[Node, Node]:
    """Apply the tail to ``source`` [B, *, H] instead of the final states.

    Args:
        in_place: put each copy beside its original, in whose modes it then runs; or all of them where the emitter
            stands, under the autocast of the originals.
        replaced: what stands for other inputs of the tail.

    Returns:
        Where each original's value now comes from; the head's input is among the keys.
    """
    mapping = {**(replaced or {}), final.states: source}
    modes = modes_of(emit.graph)
    for node in final.tail:
        inputs = [n for n in node.all_input_nodes if n in mapping]
        of_several = isinstance(fake_value(node.all_input_nodes[0]), (tuple, list))  # chunks, the values of a top-k
        if (op_name(node) == "getitem" and not of_several) or layout_only(node):
            mapping[node] = mapping[inputs[0]]  # all rows stay; leading axes do not matter
            if in_place and fake_value(inputs[0]).requires_grad and not fake_value(node).requires_grad:
                with emit.before(node, "rewrite_loss"):  # under no_grad
                    mapping[node] = emit.method("detach", mapping[node])
        elif in_place:
            with emit.before(node, "rewrite_loss"):
                mapping[node] = emit.copy(node, mapping)
        else:
            with emit.under(cast_as(emit.modes, modes[node])):
                mapping[node] = emit.copy(node, mapping)
    return mapping


def gather_rows(emit: Emitter, source: Node, readers: Sequence[Node], selection: Selection, origin: str) -> Node:
    """The rows of ``source`` [B, S, X] that carry loss, [B, K, X], in front of the first of its readers."""
    first = next(node for node in readers if source in node.all_input_nodes)
    with (
        emit.before(first, origin),
        # it may run under no_grad, and another one not
        emit.under(replace(emit.modes, grad=emit.modes.grad or fake_value(source).requires_grad)),
    ):
        return rows_of(emit, source, selection)


def rows_of(emit: Emitter, source: Node, selection: Selection, first: int = 0) -> Node:
    """The rows of ``source`` [B, S, X] that carry loss, [B, K, X]; its first one is at position ``first``."""
    rows = selection.gradient or selection
    positions = rows.rows
    if first:
        positions = emit.method("clamp", emit.call(operator.sub, positions, first), 0, shape_of(source)[1] - 1)
    gathered = emit.call(torch.ops.cggr.gather_rows.default, source, positions, rows.keep)
    return gathered if selection.gradient is None else _at(emit, gathered, selection.gradient.places)


def _at(emit: Emitter, hidden: Node, places: Node) -> Node:
    """``hidden`` [B, G, H] at ``places`` (int64 [B, K]): [B, K, H]."""
    index = emit.call(operator.getitem, places, (slice(None), slice(None), None))
    return emit.call(torch.gather, hidden, 1, emit.method("expand", index, -1, -1, emit.size(hidden, 2)))
