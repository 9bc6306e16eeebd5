"""How unequal the gradients of a batch's tokens are: what a selection can gain by choosing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cggr_compile.ops.gradient_norms import gradient_norms


@torch.no_grad()
def token_gradients(model: torch.nn.Module, batch: Mapping[str, Any], ignore_index: int = -100) -> Tensor:
    """float32 [B, S], norm of softmax - onehot at every position that predicts a label; 0 where there is none.

    That is the gradient of the token's loss with respect to its logits. The model is run as in evaluation, without
    labels, and left in the mode that it was in.

    Args:
        batch: the model's arguments by name, with ``labels`` [B, S], which the model shifts.

    Raises:
        ValueError: the batch has no such labels, or the model returns no logits [B, S, V] without them.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        raise ValueError("batch must have labels, integers [B, S]")
    training = model.training
    try:
        output = model.eval()(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        model.train(training)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != labels.shape:
        raise ValueError(f"model must return logits [B, S, V] when it is called without labels, got {type(output)}")
    target = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
    target = torch.where(target == ignore_index, -1, target)  # which may be a word of the vocabulary
    # sequence by sequence: probabilities of a whole batch may not fit into memory
    return torch.stack([gradient_norms(*each).float() for each in zip(logits, target, strict=True)])


def concentration(gradients: Tensor, labelled: Tensor) -> float:
    """(mean g)^2 / mean g^2 over the labelled tokens: 1 where all are alike, or zeros, small where few have most.

    A token that is known for sure, g = 0, counts as well.

    A share r of the tokens, drawn in proportion to g, gives an estimate with 1/r times this, relative to all of them;
    half of the batch gives one with 2. So a quarter of the tokens beats half of the batch below 1/2.
    """
    found = gradients[labelled].double()
    square = float((found**2).mean()) if found.numel() else 0.0
    return float(found.mean()) ** 2 / square if square > 0.0 else 1.0


def added_variance(gradients: Tensor, weights: Tensor) -> float:
    """Variance of the gradient under a selection, relative to that of all tokens, gradients taken to be independent.

    A token that is selected with probability p counts 1 / p, so its square is worth g^2 / p in the mean.

    Args:
        gradients: [B, S]. weights: [B, S], 1 / p of the selected tokens, 0 of the others.
    """
    whole = float((gradients.double() ** 2).sum())
    return float(((gradients.double() * weights.double()) ** 2).sum()) / whole if whole else 1.0
