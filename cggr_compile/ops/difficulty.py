"""``cggr::difficulty`` and ``cggr::el2n``: how hard a token is, from the router's statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.library import define_composite


def difficulty_reference(entropy: Tensor, top1: Tensor, top2: Tensor, label_logprob: Tensor, scoring: str) -> Tensor:
    """Difficulty per token, float32, same shape as the inputs.

    entropy: H(p) - p_top1; margin: 1 - (p_top1 - p_top2); loss: -log p(label); combined: their sum.
    """
    modes = {
        "entropy": lambda: entropy - top1,
        "margin": lambda: 1.0 - (top1 - top2),
        "loss": lambda: -label_logprob,
    }
    if scoring == "combined":
        return modes["entropy"]() + modes["margin"]() + modes["loss"]()
    if scoring not in modes:
        raise ValueError(f"scoring must be one of {[*modes, 'combined']}, got {scoring!r}")
    return modes[scoring]()


def el2n_reference(logsumexp: Tensor, doubled: Tensor, label_logprob: Tensor) -> Tensor:
    """||p - onehot(label)||_2 (EL2N, Paul et al., arXiv 2107.07075), float32, same shape as the inputs.

    Args:
        logsumexp: of the logits z. doubled: logsumexp of 2 z; sum p^2 = exp(doubled - 2 logsumexp).
        label_logprob: log p(label).
    """
    square = torch.exp(doubled - 2.0 * logsumexp) - 2.0 * torch.exp(label_logprob) + 1.0
    return square.clamp(min=0.0).sqrt()


difficulty = define_composite(
    "difficulty(Tensor entropy, Tensor top1, Tensor top2, Tensor label_logprob, str scoring) -> Tensor",
    difficulty_reference,
)
el2n = define_composite("el2n(Tensor logsumexp, Tensor doubled, Tensor label_logprob) -> Tensor", el2n_reference)
