"""``token_log_probs``: log-probabilities, entropies and the like from hidden states, without the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.errors import OptionError

NO_LABEL = -100


class TokenLogProbs(NamedTuple):
    """Values per position of ``p = softmax(z)``; None for those that were not asked for.

    All have the shape of the labels and are float32 (float64 for float64); 0 where there is no label.
    """

    log_prob: Tensor | None = None  # log p(label)
    entropy: Tensor | None = None  # -sum_j p_j log p_j, nats
    logsumexp: Tensor | None = None  # log sum_j exp(z_j)
    log_sum_squares: Tensor | None = None  # log sum_j p_j^2
    mean_logit: Tensor | None = None  # the mean of z
    top1_hit: Tensor | None = None  # 1 where no token's logit is above the label's; without gradient


VALUES = tuple(TokenLogProbs.__annotations__)


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
    scale: float = 1.0,
    outputs: Sequence[str] = ("log_prob", "entropy"),
    ignore_index: int = NO_LABEL,
    rows: Tensor | None = None,
    keep: Tensor | None = None,
    weights: Tensor | None = None,
) -> TokenLogProbs:
    """What a loss reads of ``z = softcap * tanh(scale * (h W^T + b) / softcap) / temperature``, without keeping z.

    Differentiable by ``hidden``, ``weight`` and ``bias``, once. Positions without a label have 0 in every value and no
    gradient, and take no time on a GPU; nothing waits for the device, and sizes depend on shapes alone. It runs
    eagerly and, without a graph break, under every backend of ``torch.compile``.

    With ``rows`` the values are exact at every labelled position all the same, but the backward takes their gradient at
    those positions only, times ``weights``: a sample of the positions with weights 1 / p gives an unbiased gradient.

    Args:
        hidden: [B, S, H] or [N, H], what the head multiplies (behind the final norm): float32, bfloat16, float16 or
            float64, as weight and bias; under autocast all are cast as ``F.linear`` does.
        weight: [V, H].
        bias: [V] or None.
        labels: integers [B, S] or [N], aligned with hidden: for a causal model shifted, position t has the token t + 1.
        temperature: divides the logits; above 0.
        softcap: at least 0; 0 for none.
        scale: factor on the products.
        outputs: names of the fields of :class:`TokenLogProbs` that are wanted.
        ignore_index: the label of positions that have none; every label outside [0, V) is one as well.
        rows: int64 [B, K] or [K], distinct positions in [0, S), whose gradient is taken; None: of all.
        keep: bool, of rows' shape, False for an unused slot; None: all are used. Only with rows.
        weights: float, of rows' shape, factor on the gradient; None: 1. Only with rows.

    Raises:
        ValueError: naming the argument whose shape, dtype or value does not fit.
    """
    unknown = [name for name in outputs if name not in VALUES]
    if isinstance(outputs, str) or unknown or not outputs:
        raise OptionError(f"outputs must be names out of {VALUES}, got {outputs!r}")
    for name, number in (("temperature", temperature), ("softcap", softcap), ("scale", scale)):
        if not isinstance(number, (int, float)):
            raise OptionError(f"{name} must be a number, got {type(number).__name__}")
    if not temperature > 0.0:
        raise OptionError(f"temperature must be > 0, got {temperature}")
    if not softcap >= 0.0:
        raise OptionError(f"softcap must be >= 0 (0 for none), got {softcap}")
    if hidden.dim() not in (2, 3):
        raise OptionError(f"hidden must be [B, S, H] or [N, H], got {tuple(hidden.shape)}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if ignore_index >= 0:
        labels = torch.where(labels == ignore_index, NO_LABEL, labels)
    row_hidden = None
    if rows is not None:
        weights = _slot_weights(rows, keep, weights, labels)
        keep = weights != 0.0
        three = hidden.dim() == 3
        parts = (hidden, rows, keep) if three else (hidden[None], rows[None], keep[None])
        row_hidden = torch.ops.cggr.gather_rows(*parts)
        row_hidden, hidden = row_hidden if three else row_hidden[0], hidden.detach()
    elif keep is not None or weights is not None:
        raise OptionError("keep and weights need rows")
    found = torch.ops.cggr.token_log_probs(
        *(hidden, weight, bias, labels, row_hidden, rows, weights, scale / temperature, softcap / temperature),
        *("log_sum_squares" in outputs, "mean_logit" in outputs, True),
    )
    return TokenLogProbs(*(value if name in outputs else None for name, value in zip(VALUES, found, strict=True)))


def _slot_weights(rows: Tensor, keep: Tensor | None, weights: Tensor | None, labels: Tensor) -> Tensor:
    """float32, of rows' shape: 0 at unused slots."""
    if rows.dim() != labels.dim() or rows.shape[:-1] != labels.shape[:-1] or rows.dtype != torch.int64:
        raise OptionError(f"rows must be int64 {[*labels.shape[:-1], 'K']}, got {rows.dtype} {tuple(rows.shape)}")
    if keep is not None and (keep.shape != rows.shape or keep.dtype != torch.bool):
        raise OptionError(f"keep must be bool {tuple(rows.shape)}, got {keep.dtype} {tuple(keep.shape)}")
    if weights is None:
        weights = torch.ones_like(rows, dtype=torch.float32)
    elif weights.shape != rows.shape or not weights.is_floating_point():
        raise OptionError(f"weights must be floats {tuple(rows.shape)}, got {weights.dtype} {tuple(weights.shape)}")
    weights = weights.detach().float()
    return weights if keep is None else torch.where(keep, weights, 0.0)
