"""``scoring="combined"``."""

from __future__ import annotations

from torch import Tensor

from cggr_compile.scorings import entropy as by_entropy
from cggr_compile.scorings import loss as by_loss
from cggr_compile.scorings import margin as by_margin
from cggr_compile.scorings.record import Scoring


def difficulty(entropy: Tensor, top1: Tensor, top2: Tensor, label_logprob: Tensor) -> Tensor:
    unsure = by_entropy.difficulty(entropy, top1) + by_margin.difficulty(top1, top2)
    return unsure + by_loss.difficulty(label_logprob)


SCORING = Scoring(name="combined", doc="the sum of `entropy`, `margin` and `loss`", formula=difficulty)
