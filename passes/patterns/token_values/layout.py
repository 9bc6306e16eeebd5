"""Which axes of a tensor are sequences, positions and features, and what a view makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

# Kinds of axes: sequences of the batch, positions of a sequence, both in one, anything else.
BATCH, TOKEN, FLAT, FEATURE = "batch", "token", "flat", "feature"


@dataclass(frozen=True)
class Window:
    """The positions that a tensor has a row for.

    ``count`` sequences from ``first`` on, ``length`` positions of each from ``start`` on, which may be negative: of a
    tensor that is shifted. On a flat axis, ``rows`` of these ``count * length`` from ``begin`` on (-1: all of them).
    """

    first: int
    count: int
    start: int
    length: int
    begin: int = 0
    rows: int = -1

    @property
    def full(self) -> bool:
        """Whether no rows are left out on a flat axis."""
        return self.begin == 0 and self.rows == -1

    @property
    def size(self) -> int:
        """How many rows there are on a flat axis."""
        return self.count * self.length if self.rows == -1 else self.rows

    def part(self, begin: int, rows: int) -> Window:
        """Of the rows on a flat axis, ``rows`` from ``begin`` on; one way to say so for each part."""
        whole = begin == 0 and rows == self.count * self.length
        return replace(self, begin=begin, rows=-1 if whole else rows)


@dataclass(frozen=True)
class Layout:
    """The axes of a tensor with a row per position.

    Attributes:
        axes: a kind each: BATCH and TOKEN, in this order, or FLAT; and features.
        features: sizes of the feature axes, in order.
        classes: of each feature axis, whether it runs over the vocabulary.
    """

    axes: tuple[str, ...]
    window: Window
    features: tuple[int, ...]
    classes: tuple[bool, ...]

    @property
    def has_classes(self) -> bool:
        return any(self.classes)

    @property
    def tokens_first(self) -> bool:
        return self.axes in ((BATCH, TOKEN, *self._tail(2)), (FLAT, *self._tail(1)))

    @property
    def flat(self) -> bool:
        return FLAT in self.axes

    def _tail(self, count: int) -> tuple[str, ...]:
        return (FEATURE,) * (len(self.axes) - count)

    def feature_of(self, axis: int) -> int | None:
        """The number of the feature on an axis; None for sequences and positions."""
        axis %= len(self.axes)
        return self.axes[:axis].count(FEATURE) if self.axes[axis] == FEATURE else None

    def with_features(self, features: Sequence[int], classes: Sequence[bool]) -> Layout:
        return replace(self, features=tuple(features), classes=tuple(classes))

    def without(self, gone: Sequence[int]) -> Layout:
        """Without some axes of features."""
        dropped = {self.feature_of(axis) for axis in gone}
        rest = [i for i in range(len(self.features)) if i not in dropped]
        axes = tuple(kind for axis, kind in enumerate(self.axes) if axis not in gone)
        return Layout(axes, self.window, tuple(self.features[i] for i in rest), tuple(self.classes[i] for i in rest))


def reshaped(layout: Layout, old: Sequence[int], new: Sequence[int]) -> Layout | None:
    """The layout of a tensor viewed in another shape; None where that mixes positions with anything else."""
    window = layout.window
    marks = iter(layout.classes)
    source = [(kind, size, kind == FEATURE and next(marks)) for kind, size in zip(layout.axes, old, strict=True)]
    kinds: dict[int, tuple[str, bool]] = {}
    left = [entry for entry in source if entry[1] != 1]
    right = [(axis, size) for axis, size in enumerate(new) if size != 1]
    while left and right:
        group, onto = [left.pop(0)], [right.pop(0)]
        while (mine := math.prod(size for _, size, _ in group)) != (theirs := math.prod(size for _, size in onto)):
            rest: list[Any] = left if mine < theirs else right
            if not rest:
                return None
            (group if mine < theirs else onto).append(rest.pop(0))
        found = _regrouped(group, [size for _, size in onto], window)
        if found is None:
            return None
        kinds |= {axis: kind for (axis, _), kind in zip(onto, found, strict=True)}
    if left or right:
        return None
    named = [kinds.get(axis, (FEATURE, False)) for axis in range(len(new))]
    axes = _single_axes([kind for kind, _ in named], layout, new)
    if axes is None:
        return None
    if FLAT not in axes or FLAT not in layout.axes:
        window = replace(window, begin=0, rows=-1)
    features = [(new[axis], named[axis][1]) for axis, kind in enumerate(axes) if kind == FEATURE]
    return Layout(tuple(axes), window, tuple(size for size, _ in features), tuple(mark for _, mark in features))


def _regrouped(group: list[tuple[str, int, bool]], sizes: list[int], window: Window) -> list[tuple[str, bool]] | None:
    kinds = [kind for kind, _, _ in group]
    if kinds == [FEATURE] * len(kinds):
        return [(FEATURE, any(mark for _, _, mark in group))] * len(sizes)
    if len(sizes) == 1 and (len(kinds) == 1 or kinds == [BATCH, TOKEN]):
        return [(kinds[0] if len(kinds) == 1 else FLAT, False)]
    if kinds == [FLAT] and window.full and sizes == [window.count, window.length]:
        return [(BATCH, False), (TOKEN, False)]
    return None


def _single_axes(kinds: list[str], source: Layout, new: Sequence[int]) -> list[str] | None:
    """Gives sequences or positions an axis where there is only one of them: one of size 1, or a flat one for both."""
    if BATCH in kinds and TOKEN in kinds:
        return kinds if kinds.index(BATCH) < kinds.index(TOKEN) else None
    if FLAT in kinds:
        at = kinds.index(FLAT)
        if source.window.count == 1 and source.window.full and at and new[at - 1] == 1:
            kinds[at - 1 : at + 1] = [BATCH, TOKEN]
        return kinds
    if TOKEN in kinds:  # one sequence
        at = kinds.index(TOKEN)
        if at and kinds[at - 1] == FEATURE and new[at - 1] == 1:
            kinds[at - 1] = BATCH
        else:
            kinds[at] = FLAT
        return kinds
    if BATCH in kinds:  # one position
        at = kinds.index(BATCH)
        if at + 1 < len(kinds) and kinds[at + 1] == FEATURE and new[at + 1] == 1:
            kinds[at + 1] = TOKEN
        else:
            kinds[at] = FLAT
        return kinds
    return None


def permuted(layout: Layout, order: Sequence[int]) -> tuple[Layout, list[int]] | None:
    """The layout with its axes in another order, and the order that its features are in then."""
    axes = tuple(layout.axes[axis] for axis in order)
    if BATCH in axes and axes.index(BATCH) > axes.index(TOKEN):
        return None
    features = [found for axis in order if (found := layout.feature_of(axis)) is not None]
    sizes, marks = [layout.features[i] for i in features], [layout.classes[i] for i in features]
    return Layout(axes, layout.window, tuple(sizes), tuple(marks)), features


def cut(layout: Layout, axis: int, begin: int, size: int) -> Layout:
    """The layout of ``size`` entries of an axis from ``begin`` on."""
    window, kind = layout.window, layout.axes[axis]
    if kind == BATCH:
        return replace(layout, window=replace(window, first=window.first + begin, count=size))
    if kind == TOKEN:
        return replace(layout, window=replace(window, start=window.start + begin, length=size))
    if kind == FLAT:
        return replace(layout, window=window.part(window.begin + begin, size))
    number = layout.feature_of(axis)
    features = [size if i == number else old for i, old in enumerate(layout.features)]
    return layout.with_features(features, layout.classes)


def picked(layout: Layout, axis: int, at: int) -> Layout | None:
    """The layout of one entry of an axis, which is gone then."""
    window, kind = layout.window, layout.axes[axis]
    axes = list(layout.axes)
    if kind == FEATURE:
        return layout.without([axis])
    if kind == FLAT:
        return None
    if kind == BATCH:
        window = window.part(at * window.length, window.length)
    else:
        window = replace(window, start=window.start + at, length=1)
    axes[axes.index(TOKEN if kind == BATCH else BATCH)] = FLAT
    del axes[axis]
    return replace(layout, axes=tuple(axes), window=window)


def joined(layouts: Sequence[Layout], axis: int) -> Layout | None:
    """The layout of tensors one behind the other along an axis of sequences or positions, if they follow each other."""
    kind, window = layouts[0].axes[axis], layouts[0].window
    for other in layouts[1:]:
        following = _following(kind, window, other.window)
        if following is None:
            return None
        window = following
    return replace(layouts[0], window=window)


def _following(kind: str, one: Window, other: Window) -> Window | None:
    """Both, if ``other`` begins where ``one`` ends."""
    sequences = replace(one, first=one.first + one.count, count=other.count)
    positions = replace(one, start=one.start + one.length, length=other.length)
    whole = one.full and other.full
    if whole and kind != TOKEN and other == sequences:
        return replace(one, count=one.count + other.count)
    if whole and other == positions and (kind == TOKEN or (kind == FLAT and one.count == 1)):
        return replace(one, length=one.length + other.length)
    if kind == FLAT and other == one.part(one.begin + one.size, other.size):
        return one.part(one.begin, one.size + other.size)
    return None


def stacked(layouts: Sequence[Layout]) -> Layout | None:
    """The layout of sequences, each with a flat axis in front, stacked to a batch; None where they do not follow."""
    window, axes = layouts[0].window, layouts[0].axes
    if not axes or axes[0] != FLAT or window.begin % window.length or window.size != window.length:
        return None
    begin = window.begin
    for other in layouts[1:]:
        begin += window.length
        if other.window.part(0, window.length) != window.part(0, window.length) or other.window.begin != begin:
            return None
    here = Window(window.first + window.begin // window.length, len(layouts), window.start, window.length)
    return replace(layouts[0], axes=(BATCH, TOKEN, *axes[1:]), window=here)
