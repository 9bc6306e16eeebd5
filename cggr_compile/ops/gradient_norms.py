"""``cggr::gradient_norms``: how large the gradient of each token's loss is with respect to its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.head_gradients import known_labels, wide
from cggr_compile.ops.library import define_composite


def gradient_norms_reference(logits: Tensor, labels: Tensor) -> Tensor:
    """``||softmax(z) - onehot(label)||``, in [0, sqrt(2)], float32 (float64 for float64) of the shape of ``labels``.

    Args:
        logits: z, floats [..., V]. labels: integers [...]; one outside [0, V) gives 0.
    """
    known, safe = known_labels(labels, logits.shape[-1])
    z = logits.to(wide(logits.dtype))
    top = z.amax(-1, keepdim=True)
    mass = torch.exp(z - top)
    total = mass.sum(-1)
    own = torch.exp(z.gather(-1, safe[..., None]) - top)[..., 0] / total
    return torch.where(known, _norms(mass.square().sum(-1) / total.square(), own), 0.0)


def gradient_norms_of(log_prob: Tensor, log_sum_squares: Tensor) -> Tensor:
    """The same from log p(label) and log sum p^2, as ``cggr::token_log_probs`` gives them."""
    return _norms(torch.exp(log_sum_squares), torch.exp(log_prob))


def _norms(squares: Tensor, own: Tensor) -> Tensor:
    return (squares - 2.0 * own + 1.0).clamp(min=0.0).sqrt()


gradient_norms = define_composite("gradient_norms(Tensor logits, Tensor labels) -> Tensor", gradient_norms_reference)
