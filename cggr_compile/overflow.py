"""Counts gradient rows that found no slot, and says so once, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.metrics import OVERFLOW
from cggr_compile.readback import Readback


class ContextOverflow:
    """Rows that should have carried gradient without loss, but found no slot, in any step so far."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._readback = Readback()

    def add(self, stats: Tensor) -> str:
        """The figures (``cggr::stats``) of a step; what to tell the user, empty if nothing is known to have overflown.

        Stays on the device. What is told was counted some steps ago.
        """
        if stats.numel() <= OVERFLOW:
            return ""
        dropped = stats[OVERFLOW].detach().to(torch.int64)
        self._total = dropped if self._total is None else self._total.to(dropped.device) + dropped
        arrived = self._readback.receive()
        self._readback.send(self._total)
        if not arrived or not arrived[0]:
            return ""
        return (
            "a batch had more positions that carry gradient without a label than the first batch had slots for: what "
            "is trained through them misses the gradient of some (metrics()['context_overflow'] counts these). "
            "options={'gradient': 'exact'} misses none; a first batch with as many as any makes the slots"
        )

    def count(self) -> int | None:
        """How many, None if no graph has such rows. Waits for the device."""
        return None if self._total is None else int(self._total)
