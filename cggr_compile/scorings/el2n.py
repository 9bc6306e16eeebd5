"""``scoring="el2n"``."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.scorings.record import Scoring


def difficulty(logsumexp: Tensor, doubled: Tensor, label_logprob: Tensor) -> Tensor:
    """From the logits z: sum p^2 = exp(doubled - 2 logsumexp), ``doubled`` the logsumexp of 2 z."""
    square = torch.exp(doubled - 2.0 * logsumexp) - 2.0 * torch.exp(label_logprob) + 1.0
    return square.clamp(min=0.0).sqrt()


SCORING = Scoring(
    name="el2n",
    doc="‖p - onehot(label)‖ (EL2N, arXiv 2107.07075); `doubled`, the logsumexp of twice the logits, takes a second "
    "product of the head",
    formula=difficulty,
)
