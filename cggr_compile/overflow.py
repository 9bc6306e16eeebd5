"""Counts positions that found no slot, and says so once, without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from cggr_compile.ops.metrics import GRADIENT, GRADIENT_NAMES, STAT_NAMES
from cggr_compile.readback import Readback

_SELECTED, _TOTAL = STAT_NAMES.index("tokens_selected"), STAT_NAMES.index("tokens_total")
_EXTRA, _CONTEXT = (1 + GRADIENT_NAMES.index(name) for name in ("extra_overflow", "context_overflow"))


@dataclass(frozen=True)
class Notice:
    """What to tell the user; ``alarm`` where something is not as the options ask."""

    text: str
    alarm: bool


_LABELS = Notice(
    "a batch had more tokens with a label than slots: it is trained on a random part of them, weighted "
    "(metrics()['labels_overflow'] counts the others). A larger max_selected makes more slots",
    alarm=False,
)
_CONTEXT_ROWS = Notice(
    "a batch had more context than slots: the positions farthest in front of what is trained on carry no gradient "
    "(metrics()['context_overflow'] counts them). A larger max_selected makes more slots, a smaller context needs less",
    alarm=False,
)
_EXTRA_ROWS = Notice(
    "a batch had more positions that carry gradient without a label than the first batch had slots for: what "
    "is trained through them misses the gradient of some (metrics()['context_overflow'] counts these). "
    "options={'gradient': 'exact'} misses none; a first batch with as many as any makes the slots",
    alarm=True,
)


class Overflow:
    """Positions without a slot in any step so far: labels, and rows that should carry gradient without loss."""

    def __init__(self) -> None:
        self._total: Tensor | None = None  # int64 [4]: labels, gradient rows, extra and context ones without a slot
        self._labels = self._gradient = False
        self._readback = Readback()

    def add(self, stats: Tensor, labels: bool) -> list[Notice]:
        """Count the figures (``cggr::stats``) of a step; returns what is known to have overflowed.

        ``labels``: whether its selection takes every label. Stays on the device. What is told was counted some steps
        ago.
        """
        gradient = stats.numel() > GRADIENT
        if not labels and not gradient:
            return []
        missed = stats[_TOTAL : _TOTAL + 1] - stats[_SELECTED : _SELECTED + 1] if labels else stats.new_zeros(1)
        counts = torch.cat([missed, stats[GRADIENT:]]) if gradient else pad(missed, (0, len(GRADIENT_NAMES)))
        counts = counts.detach().to(torch.int64)
        self._total = counts if self._total is None else self._total.to(counts.device) + counts
        self._labels, self._gradient = self._labels or labels, self._gradient or gradient
        arrived = self._readback.receive()
        self._readback.send(self._total)
        if arrived is None:
            return []
        found = [_EXTRA_ROWS] if arrived[_EXTRA] else []
        if arrived[0]:
            return [*found, _LABELS]
        return [*found, _CONTEXT_ROWS] if arrived[_CONTEXT] else found

    def labels(self) -> int | None:
        """How many labels, None if no selection takes every one. Waits for the device."""
        return int(self._total[0]) if self._total is not None and self._labels else None

    def context(self) -> int | None:
        """How many rows that should carry gradient, None if no graph has such rows. Waits for the device."""
        if self._total is None or not self._gradient:
            return None
        return int(self._total[_EXTRA] + self._total[_CONTEXT])
