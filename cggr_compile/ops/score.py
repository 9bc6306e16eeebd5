"""``cggr::score``: statistics of every row's next-token distribution, without keeping the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.library import define_opaque

# Rows are scored in chunks of about this many logits, so that memory does not grow with N * V.
CHUNK_LOGITS = 1 << 24


def score_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of ``p = softmax(z)``, ``z = softcap * tanh(scale * (h W^T + b) / softcap)``, per row.

    Args:
        hidden: [..., H], any float dtype.
        weight: [V, H], same dtype. bias: [V] or None.
        labels: int64 [...]; a label outside [0, V) (such as -100) scores label_logprob 0.
        scale: factor on the logits. softcap: 0 for none.

    Returns:
        logsumexp, entropy (nats), top-1 and top-2 probability, log p(label): float32 [...] each. Equal top
        logits give equal probabilities (top1 == top2).
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    flat_labels = labels.reshape(-1)
    vocab = weight.shape[0]
    chunk = max(1, CHUNK_LOGITS // vocab)
    outputs = [hidden.new_empty(rows.shape[0], dtype=torch.float32) for _ in range(5)]
    for begin in range(0, rows.shape[0], chunk):
        part = slice(begin, begin + chunk)
        logits = torch.nn.functional.linear(rows[part], weight, bias).float()
        if scale != 1.0:
            logits = logits * scale
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        lse = torch.logsumexp(logits, -1)
        top = torch.exp(logits.topk(min(2, vocab), -1).values - lse[:, None])
        known = (flat_labels[part] >= 0) & (flat_labels[part] < vocab)
        picked = logits.gather(-1, torch.where(known, flat_labels[part], 0)[:, None])[:, 0]
        outputs[0][part] = lse
        # H = lse - E[z], with E[z] = sum(p z)
        outputs[1][part] = lse - (torch.exp(logits - lse[:, None]) * logits).sum(-1)
        outputs[2][part] = top[:, 0]
        outputs[3][part] = top[:, 1] if vocab > 1 else 0.0
        outputs[4][part] = torch.where(known, picked - lse, 0.0)
    lse, entropy, top1, top2, label_logprob = (out.view(labels.shape) for out in outputs)
    return lse, entropy, top1, top2, label_logprob


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, softcap: float
) -> tuple[Tensor, ...]:
    return tuple(hidden.new_empty(labels.shape, dtype=torch.float32) for _ in range(5))


score = define_opaque(
    "score(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float scale, float softcap)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    score_reference,
    _fake,
)
