"""Where a tensor keeps its tokens: one tag per axis, carried along by dataflow and never guessed from sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

# "B": sequences. "S": positions. "BS": both, flattened. "b": size 1 where its partners have "B". None: neither.
Tag = str | None
Layout = tuple[Tag, ...]


def token_axes(layout: Layout) -> list[int]:
    return [axis for axis, tag in enumerate(layout) if tag in ("B", "S", "BS")]


def has_rows(layout: Layout) -> bool:
    return "S" in layout or "BS" in layout


def regroup(old: Sequence[int], layout: Layout, new: Sequence[int], batch: int) -> Layout | None:
    """Layout of a view of ``old`` as ``new``; None if it mixes positions with anything but their batch.

    A view splits into independent groups of axes with equal products; only the order of axes decides.
    """
    tags: list[Tag] = []
    i = j = 0
    lone = batch == 1  # a batch axis of size 1 comes and goes in views: "S" alone is then "BS"
    while i < len(old) or j < len(new):
        left, right = [], []
        # axes of size 1 stand for themselves, unless they are what carries a tag
        if i < len(old) and old[i] == 1 and not (j < len(new) and new[j] == 1):
            if layout[i] in ("S", "BS"):
                return None
            if layout[i] == "B":
                layout = tuple("BS" if tag == "S" else tag for tag in layout)
            i += 1
            continue
        if j < len(new) and new[j] == 1 and not (i < len(old) and old[i] == 1):
            joined = lone and i < len(old) and layout[i] == "BS"
            if joined:
                layout = tuple("S" if tag == "BS" else tag for tag in layout)
            tags.append("B" if joined else None)
            j += 1
            continue
        if i >= len(old) or j >= len(new):
            return None
        left.append(i)
        right.append(j)
        i, j = i + 1, j + 1
        while math.prod(old[a] for a in left) != math.prod(new[b] for b in right):
            if math.prod(old[a] for a in left) < math.prod(new[b] for b in right):
                if i >= len(old):
                    return None
                left.append(i)
                i += 1
            else:
                if j >= len(new):
                    return None
                right.append(j)
                j += 1
        inside = [layout[a] for a in left]
        if len(left) == len(right) == 1:
            tags.append(inside[0])
        elif not any(inside):
            tags.extend([None] * len(right))
        elif inside == ["B", "S"] and len(right) == 1:
            tags.append("BS")
        elif inside == ["BS"] and len(right) == 2:
            tags.extend(["B", "S"])
        else:
            return None
    return tuple(tags)


def resize(shape: Sequence[int], layout: Layout, batch: int, slots: int) -> list[int]:
    """Shape of the row version: positions become slots."""
    sizes = {"B": batch, "b": batch if has_rows(layout) else 1, "S": slots, "BS": batch * slots}
    return [sizes.get(tag, size) if tag else size for size, tag in zip(shape, layout, strict=True)]


def align(layout: Layout, shape: Sequence[int], other: Sequence[int]) -> Layout | None:
    """Layout of an operand of shape ``other`` that broadcasts against ``shape`` with ``layout``.

    None if the operand has fewer axes and its rows would need a batch axis of their own.
    """
    skipped = len(shape) - len(other)
    tags: list[Tag] = []
    for tag, size, mine in zip(layout[skipped:], shape[skipped:], other, strict=True):
        tags.append(tag if mine == size else ("b" if tag == "B" else None))
    found = tuple(tags)
    if not has_rows(found):
        return tuple(tag if tag == "B" else None for tag in found)
    if "BS" not in found and "B" not in found and "b" not in found:
        return None
    return found
