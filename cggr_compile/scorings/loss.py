"""``scoring="loss"``."""

from __future__ import annotations

from torch import Tensor

from cggr_compile.scorings.record import Scoring


def difficulty(label_logprob: Tensor) -> Tensor:
    return -label_logprob


SCORING = Scoring(name="loss", doc="-log p(label)", formula=difficulty)
