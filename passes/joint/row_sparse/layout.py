"""Where a tensor keeps its tokens: one tag per axis, carried along by dataflow and never guessed from sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

# "B": sequences. "B*": sequences, flattened with axes after them (attention heads). "S": positions.
# "BS": sequences and positions, flattened. "b": size 1 where its partners have "B". None: none of these.
Tag = str | None
Layout = tuple[Tag, ...]
SEQUENCES = ("B", "B*", "b")


def canonical(layout: Layout, batch: int) -> Layout:
    """One sequence needs no axis of its own: views drop and add axes of size 1 anywhere, so "S" alone is "BS"."""
    if batch > 1:
        return layout
    return tuple("BS" if tag in ("S", "BS") else None for tag in layout)


def token_axes(layout: Layout) -> list[int]:
    return [axis for axis, tag in enumerate(layout) if tag in ("B", "B*", "S", "BS")]


def has_rows(layout: Layout) -> bool:
    return "S" in layout or "BS" in layout


def positions_first(layout: Layout) -> bool:
    """Whether the positions have an axis in front of their sequences': [S, B, ...], which is not gathered from."""
    tagged = [tag for tag in layout if tag]
    return tagged[:1] == ["S"] and len(tagged) > 1


def regroup(old: Sequence[int], layout: Layout, new: Sequence[int], batch: int) -> Layout | None:
    """Layout of a view of ``old`` as ``new``; None if it mixes positions with anything but their batch.

    A view splits into independent groups of axes with equal products; only the order of axes decides.
    ``layout`` is canonical, and so is the result.
    """
    tags: list[Tag] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        # axes of size 1 stand for themselves, unless they are what carries a tag
        if i < len(old) and old[i] == 1 and not (j < len(new) and new[j] == 1):
            if layout[i] is not None:
                return None
            i += 1
            continue
        if j < len(new) and new[j] == 1 and not (i < len(old) and old[i] == 1):
            tags.append(None)
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
        elif inside == ["BS"] and len(right) == 2 and new[right[0]] == batch:
            tags.extend(["B", "S"])
        elif inside[0] in ("B", "B*") and not any(inside[1:]) and new[right[0]] % batch == 0:
            tags.extend(["B" if new[right[0]] == batch else "B*", *[None] * (len(right) - 1)])
        else:
            return None
    return tuple(tags)


def resize(shape: Sequence[int], layout: Layout, batch: int, slots: int) -> list[int]:
    """Shape of the row version: positions become slots."""
    sizes = {"b": batch if has_rows(layout) else 1, "S": slots, "BS": batch * slots}
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
        return tuple(tag if tag in ("B", "B*") else None for tag in found)
    if "BS" not in found and not any(tag in SEQUENCES for tag in found):
        return None
    return found
