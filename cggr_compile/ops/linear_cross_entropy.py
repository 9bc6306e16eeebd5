"""``cggr::linear_cross_entropy``: the cross-entropy of a head's logits, row by row, without keeping the logits.

It is arithmetic on ``cggr::token_log_probs``, where every row counts as labelled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.gradient_norms import gradient_norms_of
from cggr_compile.ops.head_gradients import known_labels
from cggr_compile.ops.library import define_composite
from cggr_compile.ops.token_log_probs import check_head, token_log_probs


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float,
    label_smoothing: float,
    norms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and logsumexp of ``z = softcap * tanh(scale * (h W^T + b) / softcap)``, per row; both differentiable.

    ``loss = logsumexp(z) - (1 - label_smoothing) * z[label] - label_smoothing * mean(z)``. Weights, a reduction and
    its normaliser are arithmetic on the loss; a z-loss (PaLM, arXiv 2204.02311, section 5) is on the logsumexp.

    Args:
        hidden: [N, H]. weight: [V, H]. bias: [V] or None. One float dtype.
        labels: integers [N]; at a row whose label is outside [0, V) (such as -100) the loss is 0, without gradient.
        scale: factor on the products. softcap: 0 for none. label_smoothing: in [0, 1] (arXiv 1512.00567).
        norms: whether the third result is wanted.

    Returns:
        float32 [N] each (float64 for float64): loss; logsumexp; and, without a gradient, ``||softmax(z) -
        onehot(label)||``, see ``cggr::gradient_norms``, or an empty tensor.

    Raises:
        ValueError: naming the argument whose shape, dtype or value does not fit.
    """
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be floats [rows, features], got {hidden.dtype} {tuple(hidden.shape)}")
    check_head(hidden, weight, bias, labels, softcap)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    known, safe = known_labels(labels, weight.shape[0])
    # rows without a label have a logsumexp too: none is left out
    log_prob, _, logsumexp, log_squares, mean, _ = token_log_probs(
        hidden, weight, bias, safe, None, None, None, scale, softcap, norms, label_smoothing != 0.0, False
    )
    loss = -log_prob
    if label_smoothing:
        loss = torch.lerp(loss, logsumexp - mean, label_smoothing)
    found = log_squares.detach()
    if norms:
        found = torch.where(known, gradient_norms_of(log_prob.detach(), found), 0.0)
    return torch.where(known, loss, 0.0), logsumexp, found


linear_cross_entropy = define_composite(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float scale, float softcap,"
    " float label_smoothing, bool norms=False) -> (Tensor, Tensor, Tensor)",
    linear_cross_entropy_reference,
)
