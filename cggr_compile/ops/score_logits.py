"""``cggr::score_logits``: what ``cggr::score`` says of a row, from logits that exist already."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.library import define_composite


def score_logits_reference(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of ``p = softmax(logits)`` per row.

    Args:
        logits: [..., V], any float dtype; -inf for a token that cannot occur.
        labels: int64 [...]; a label outside [0, V) (such as -100) scores label_logprob 0.

    Returns:
        logsumexp, entropy (nats), top-1 and top-2 probability, log p(label): float32 [...] each. Equal top logits give
        equal probabilities (top1 == top2).
    """
    vocab = logits.shape[-1]
    z = logits.float()
    lse = torch.logsumexp(z, -1)
    entropy = torch.special.entr(torch.exp(z - lse[..., None])).sum(-1)
    # only reductions: a compiler fuses them, where a top-k would write the logits out once more
    top = z.amax(-1)
    best = z == top[..., None]
    runner_up = torch.where(best.sum(-1) > 1, top, z.masked_fill(best, -torch.inf).amax(-1))
    known = (labels >= 0) & (labels < vocab)
    picked = z.gather(-1, torch.where(known, labels, 0)[..., None])[..., 0]
    label_logprob = torch.where(known, picked - lse, 0.0)
    return lse, entropy, torch.exp(top - lse), torch.exp(runner_up - lse), label_logprob


score_logits = define_composite(
    "score_logits(Tensor logits, Tensor labels) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", score_logits_reference
)
