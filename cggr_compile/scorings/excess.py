"""``scoring="excess"``."""

from __future__ import annotations

from torch import Tensor

from cggr_compile.scorings import loss
from cggr_compile.scorings.record import Scoring


def difficulty(label_logprob: Tensor, reference_loss: Tensor) -> Tensor:
    return loss.difficulty(label_logprob) - reference_loss


SCORING = Scoring(
    name="excess",
    doc="`loss` minus the loss of another model (Rho-1, arXiv 2404.07965), an input of the graph that "
    "`cggr_compile.with_reference_loss` makes",
    formula=difficulty,
)
