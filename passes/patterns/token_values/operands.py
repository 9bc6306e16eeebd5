"""Where the rows of an operand lie: in what it is a slice, a piece or a reshaped form of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cggr_compile.passes.nodes import argument, fake_value, op_name, shape_of
from cggr_compile.passes.patterns.token_values.layout import BATCH, FEATURE, FLAT, TOKEN, Layout, reshaped

if TYPE_CHECKING:
    from torch.fx import Node

_SHAPES = {"view", "reshape", "unsqueeze", "squeeze", "contiguous", "detach"}
_PIECES = {"split": "split_size_or_sections", "chunk": "chunks", "tensor_split": "indices_or_sections"}


def base_of(node: Node, layout: Layout, unwritten: Callable[[Node], bool]) -> tuple[Node, Layout]:
    """The tensor that ``node`` is a part of, in another shape perhaps, and its layout; its features may be reshaped.

    Pieces of one tensor so become the same operand::

        labels[:, 1:].split(64, 1)[2].reshape(-1)    # labels, shifted by one

    Args:
        unwritten: whether nothing writes to a node's memory, so that it is the same earlier.
    """
    while unwritten(node):
        found = _outer(node, layout)
        if found is None:
            break
        node, layout = found
    return node, layout


def _outer(node: Node, layout: Layout) -> tuple[Node, Layout] | None:
    name = op_name(node)
    if node.op not in ("call_function", "call_method") or not node.args or not hasattr(node.args[0], "meta"):
        return None
    source: Any = node.args[0]
    if name in _SHAPES:
        outer = reshaped(layout, shape_of(node), shape_of(source))
        same = outer is not None and _big(outer) == _big(layout)
        return (source, outer) if outer is not None and same else None
    if name != "getitem":
        return None
    if isinstance(fake_value(source), (tuple, list)):
        return _of_pieces(source, int(node.args[1]), layout)  # type: ignore[arg-type]
    return _of_slice(node, source, layout)


def _big(layout: Layout) -> list[int]:
    return [size for size in layout.features if size != 1]


def _of_pieces(pieces: Node, number: int, layout: Layout) -> tuple[Node, Layout] | None:
    if op_name(pieces) not in _PIECES:
        return None
    source: Any = pieces.args[0]
    dim = argument(pieces, 2, "dim", 0)
    if not isinstance(dim, int) or not hasattr(source, "meta"):
        return None
    dim %= len(shape_of(source))
    before = sum(part.shape[dim] for part in fake_value(pieces)[:number])
    outer = _before_slice(layout, dim, before, shape_of(source)[dim])
    return None if outer is None else (source, outer)


def _of_slice(node: Node, source: Node, layout: Layout) -> tuple[Node, Layout] | None:
    index: Any = node.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    sizes = shape_of(source)
    if any(item is None for item in items):  # new axes
        rest = [item for item in items if item is not None and item is not Ellipsis]
        if not all(item == slice(None) for item in rest):
            return None
        outer = reshaped(layout, shape_of(node), sizes)
        return (source, outer) if outer is not None and _big(outer) == _big(layout) else None
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(sizes) - len(items) + 1)
    items += [slice(None)] * (len(sizes) - len(items))
    if isinstance(items[0], int):
        return _of_sequence(source, items, layout)
    for axis, item in enumerate(items):
        if not isinstance(item, slice) or item.step not in (None, 1) or not isinstance(sizes[axis], int):
            return None
        begin, end, _ = item.indices(sizes[axis])
        if end - begin == sizes[axis]:
            continue
        outer = _before_slice(layout, axis, begin, sizes[axis])
        if outer is None:
            return None
        layout = outer
    return source, layout


def _of_sequence(source: Node, items: list[Any], layout: Layout) -> tuple[Node, Layout] | None:
    """``labels[b]`` or ``labels[b, i:j]``, the rows of one sequence."""
    window, sizes = layout.window, shape_of(source)
    if layout.axes[:1] != (FLAT,) or len(sizes) < 2 or not all(isinstance(size, int) for size in sizes):
        return None
    if any(not isinstance(item, slice) or item.step not in (None, 1) for item in items[1:]):
        return None
    if any(item != slice(None) for item in items[2:]):
        return None
    sequence, offset = divmod(window.begin, window.length)
    if offset + window.size > window.length:
        return None  # it goes on in the next sequence
    begin = items[1].indices(sizes[1])[0]
    start, first = window.start + offset - begin, window.first + sequence - items[0] % sizes[0]
    outer = replace(window, first=first, count=sizes[0], start=start, length=sizes[1], begin=0, rows=-1)
    return source, replace(layout, axes=(BATCH, TOKEN, *layout.axes[1:]), window=outer)


def _before_slice(layout: Layout, axis: int, begin: int, size: int) -> Layout | None:
    """The layout of ``x`` of that ``size``, from that of ``x[begin:]`` along an axis."""
    kind, window = layout.axes[axis], layout.window
    if kind == FEATURE:
        return None
    if kind == BATCH:
        return replace(layout, window=replace(window, first=window.first - begin, count=size))
    if kind == TOKEN:
        return replace(layout, window=replace(window, start=window.start - begin, length=size))
    if window.full and window.count == 1:  # positions of one sequence
        return replace(layout, window=replace(window, start=window.start - begin, length=size))
    if window.begin < begin:
        return None
    return replace(layout, window=window.part(window.begin - begin, size))
