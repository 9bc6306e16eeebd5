"""Sums over the rows that carried loss lately, of how large their gradients were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cggr_compile.ops.gradient_moments import MOMENTS
from cggr_compile.relative_variance import RelativeVariance, normalised

# from one step to the next: they are about the last 20 steps
_DECAY = 0.95


class RecentConcentration:
    """Decayed sums of ``cggr::gradient_moments``, on the device.

    Attributes:
        sums: float32 [5], of :func:`cggr_compile.relative_variance.normalised` steps; None before the first.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, moments: Tensor, ratio: float) -> Tensor:
        """The sums after a selection at ``ratio`` has found these. Stays on the device."""
        step = normalised(moments, ratio)
        self.sums = step if self.sums is None else torch.add(step, self.sums.to(step.device), alpha=_DECAY)
        return self.sums

    def value(self) -> float | None:
        """(mean g)^2 / mean g^2 of about the last 20 steps; None before the first. Waits for the device."""
        found = None if self.sums is None else RelativeVariance.of(self.sums.tolist())
        return None if found is None else found.concentration

    def state_dict(self) -> list[float] | None:
        """Plain numbers. Waits for the device."""
        return None if self.sums is None else self.sums.tolist()

    def load_state_dict(self, state: Any) -> None:
        """Resume from :meth:`state_dict`.

        Raises:
            ValueError: ``state`` is not from there.
        """
        numbers = isinstance(state, list) and all(isinstance(each, float) for each in state)
        if state is not None and not (numbers and len(state) == MOMENTS):
            raise ValueError(f"state: concentration must be {MOMENTS} floats or None, got {state!r}")
        self.sums = None if state is None else torch.tensor(state)
