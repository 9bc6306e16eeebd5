"""``scoring="margin"``."""

from __future__ import annotations

from torch import Tensor

from cggr_compile.scorings.record import Scoring


def difficulty(top1: Tensor, top2: Tensor) -> Tensor:
    return 1.0 - (top1 - top2)


SCORING = Scoring(name="margin", doc="1 - (p_top1 - p_top2)", formula=difficulty)
