"""The label smoothing of transformers' Trainer, computed by the model's own loss, inside of the graph."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module


class ModelLabelSmoothing:
    """While it is on, a trainer leaves the labels to the model, whose loss smooths them as the trainer would.

    Trainer takes the labels away from the model and computes the smoothed loss of the logits it returns. Its formula is
    that of ``F.cross_entropy(..., label_smoothing=...)``.

    Args:
        trainer: a ``transformers.Trainer`` with a ``label_smoother``. model: its model, without wrappers.
    """

    def __init__(self, trainer: Any, model: Any) -> None:
        self._trainer, self._model = trainer, model
        self._smoother, self._loss = trainer.label_smoother, model.loss_function
        model.loss_function = partial(smoothed_causal_lm_loss, label_smoothing=float(self._smoother.epsilon))
        trainer.label_smoother = None

    def end(self) -> None:
        self._model.loss_function = self._loss
        self._trainer.label_smoother = self._smoother


def obstacle(trainer: Any, model: Module) -> str:
    """Why the model's loss cannot take a trainer's label smoothing over; empty if it can."""
    from transformers import Trainer
    from transformers.loss.loss_utils import ForCausalLMLoss

    if type(trainer).compute_loss is not Trainer.compute_loss:
        return f"{type(trainer).__name__} computes the loss itself, with label_smoothing_factor, outside of the model"
    forward = inspect.unwrap(type(model).forward)
    calls_it = "loss_function" in getattr(getattr(forward, "__code__", None), "co_names", ())
    if not calls_it or getattr(model, "loss_function", None) is not ForCausalLMLoss:
        return (
            f"label_smoothing_factor: {type(model).__name__} has no loss_function of a causal language model that "
            "could smooth"
        )
    return ""


def smoothed_causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    label_smoothing: float,
    **_kwargs: Any,
) -> Tensor:
    """Next-token cross-entropy with smoothed labels, called as transformers' models call their ``loss_function``.

    Args:
        logits: [B, S, V]; computed with in float32.
        labels: int64 [B, S], not shifted; not read where ``shift_labels`` is given.
        num_items_in_batch: what the summed loss is divided by; None for the number of labels.
        shift_labels: int64 [B, S], the label of the next position.
        label_smoothing: probability that is spread over the vocabulary, in [0, 1].

    Returns:
        float32 scalar.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(
        logits.float().view(-1, vocab_size),
        shift_labels.reshape(-1).to(logits.device),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch
