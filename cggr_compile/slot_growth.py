"""Doubles slots that were measured on the first batch, where later batches have more to put into them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cggr_compile.ops.metrics import GRADIENT, GRADIENT_NAMES, STAT_NAMES
from cggr_compile.readback import Readback
from cggr_compile.shared_readback import SharedReadback, sums

# Shares without a slot from which on more slots are worth their time. What finds none is not lost: labels are drawn at
# random and weighted, context is dropped.
LABELS, CONTEXT = 0.01, 0.1
# Batches to look at before deciding: one long sequence is no reason.
STEPS = 8
_SELECTED, _TOTAL = STAT_NAMES.index("tokens_selected"), STAT_NAMES.index("tokens_total")
_ROWS, _CONTEXT = (GRADIENT + GRADIENT_NAMES.index(name) for name in ("gradient_tokens", "context_overflow"))


class SlotGrowth:
    """How often the slots of one model have been doubled.

    It counts on the device and reads back without waiting: a decision is some steps late.

    Attributes:
        level: doublings so far.
    """

    def __init__(self) -> None:
        self.level = 0
        self._sum: Tensor | None = None  # float64 [6] or [9]: the number of steps, the figures of all of them
        self._readback = Readback()

    def share(self, shared: Callable[..., SharedReadback]) -> SharedReadback:
        """Decide by the batches of all processes, at the same step in each; returns what has to be advanced then."""
        self._readback = found = shared("slots", sums)
        return found

    def add(self, stats: Tensor, most: int) -> str:
        """Count the figures (``cggr::stats``) of a step; what to tell the user where ``level`` rises.

        Args:
            stats: float32 [5] or [8]. most: the largest level.
        """
        if self.level >= most:
            return ""
        figures = torch.cat([torch.ones_like(stats[:1]), stats]).double()
        self._sum = figures if self._sum is None else self._sum.to(figures.device) + figures
        received = self._readback.receive()
        if received is not None and received[0] >= STEPS and (message := _missing(received[1:])):
            self.level += 1
            self._sum = None
            return message
        self._readback.send(self._sum)
        return ""


def _missing(arrived: list[float]) -> str:
    """What to tell the user of figures that want more slots; nothing of others."""
    labels, selected = arrived[_TOTAL], arrived[_SELECTED]
    # all rows that carry gradient carry loss where there are no other figures
    lost, rows = (arrived[_CONTEXT], arrived[_ROWS]) if len(arrived) > GRADIENT else (0.0, selected)
    missed, context = labels - selected, rows - selected + lost
    if missed <= LABELS * labels and lost <= CONTEXT * context:
        return ""
    what = (
        f"{missed / labels:.1%} of the labels" if missed > LABELS * labels else f"{lost / context:.0%} of the context"
    )
    return f"{what} found no slot: batches have more than the first one. The slots are doubled"
