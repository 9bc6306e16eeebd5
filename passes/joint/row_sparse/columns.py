"""Which parts a tensor of the backward pass is put together of along one axis: the gradient of reading its parts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from cggr_compile import compat
from cggr_compile.passes.fx import is_zeros
from cggr_compile.passes.nodes import argument, fake_value, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """The columns ``start`` to ``stop``; ``flat``: ``value`` is the one column, without the axis."""

    start: int
    stop: int
    value: Node
    flat: bool = False

    @property
    def width(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Columns:
    """Parts that do not overlap, in order; zeros between them."""

    axis: int
    parts: tuple[Part, ...]

    def covers(self, size: int) -> bool:
        """Whether no column is left out."""
        stops = [0, *(part.stop for part in self.parts)]
        return [part.start for part in self.parts] == stops[:-1] and stops[-1] == size


def columns_of(node: Node) -> Columns | None:
    """Of ``cat``, of writing into zeros, and of sums of such; None of anything else."""
    reader = _READERS.get(node.target)
    return None if reader is None else reader(node)


def _concatenated(node: Node) -> Columns:
    parts: Any = node.args[0]
    axis = argument(node, 1, "dim", 0) % len(shape_of(node))
    found, stop = [], 0
    for part in parts:
        start, stop = stop, stop + shape_of(part)[axis]
        found.append(Part(start, stop, part))
    return Columns(axis, tuple(found))


def _slice_written(node: Node) -> Columns | None:
    zeros, value = node.args[:2]
    axis = argument(node, 2, "dim", 0) % len(shape_of(node))
    ends = [argument(node, 3, "start"), argument(node, 4, "end"), argument(node, 5, "step", 1)]
    start, stop, step = slice(*ends).indices(shape_of(node)[axis])
    return _written(zeros, axis, start, stop, value) if step == 1 else None


def _column_written(node: Node) -> Columns | None:
    arguments: Any = node.args
    zeros, value, axis, index = arguments
    axis %= len(shape_of(node))
    start = index % shape_of(node)[axis]
    return _written(zeros, axis, start, start + 1, value, flat=True)


def _indexed_written(node: Node) -> Columns | None:
    """index_put(zeros, [None, ..., columns], g): columns that follow each other."""
    arguments: Any = node.args
    zeros, (*whole, index), value = arguments[:3]
    axis = len(whole)
    if any(i is not None for i in whole) or index is None:
        return None
    columns = [i % shape_of(node)[axis] for i in _constant(index)]
    if not columns or columns != list(range(columns[0], columns[0] + len(columns))):
        return None
    return _written(zeros, axis, columns[0], columns[-1] + 1, value)


def _constant(index: Node) -> list[int]:
    """A list that was written in the model's code, as in ``x[:, [-1]]``; empty if it is something else."""
    if index.target is aten.lift_fresh_copy.default:
        index = index.args[0]  # type: ignore[assignment]
    value = fake_value(index)
    if index.op != "get_attr" or not isinstance(value, torch.Tensor) or value.dim() != 1:
        return []
    if value.dtype is not torch.int64:
        return []
    return compat.values_of(getattr(index.graph.owning_module, str(index.target))) or []


def _written(zeros: Any, axis: int, start: int, stop: int, value: Any, flat: bool = False) -> Columns | None:
    return Columns(axis, (Part(start, stop, value, flat),)) if is_zeros(zeros) else None


def _sum(node: Node) -> Columns | None:
    left, right = node.args
    if node.kwargs or not isinstance(left, Node) or not isinstance(right, Node) or shape_of(left) != shape_of(right):
        return None
    one, other = columns_of(left), columns_of(right)
    if one is None or other is None or one.axis != other.axis:
        return None
    parts = sorted((*one.parts, *other.parts), key=lambda part: part.start)
    if any(a.stop > b.start for a, b in pairwise(parts)):
        return None
    return Columns(one.axis, tuple(parts))


_READERS: dict[Any, Callable[[Node], Columns | None]] = {
    aten.cat.default: _concatenated,
    aten.slice_scatter.default: _slice_written,
    aten.select_scatter.default: _column_written,
    aten.index_put.default: _indexed_written,
    aten.add.Tensor: _sum,
}
