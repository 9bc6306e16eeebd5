"""``scoring="entropy"``."""

from __future__ import annotations

from torch import Tensor

from cggr_compile.scorings.record import Scoring


def difficulty(entropy: Tensor, top1: Tensor) -> Tensor:
    return entropy - top1


SCORING = Scoring(name="entropy", doc="H(p) - p_top1", formula=difficulty)
