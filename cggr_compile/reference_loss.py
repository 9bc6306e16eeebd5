"""``with_reference_loss``: brings the reference loss that ``scoring="excess"`` needs into the captured graph."""

from __future__ import annotations

import torch
from torch import Tensor

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)


def with_reference_loss(labels: Tensor, reference_loss: Tensor) -> Tensor:
    """The labels, for ``scoring="excess"`` (Rho-1, arXiv 2404.07965); call it inside the function that is compiled.

    torch.compile drops inputs that nothing uses, and models do not read a reference loss::

        @cggr_compile.train_step(scoring="excess")
        def step(model, input_ids, labels, reference_loss):
            labels = cggr_compile.with_reference_loss(labels, reference_loss)
            return model(input_ids=input_ids, labels=labels).loss

    Args:
        labels: of any shape.
        reference_loss: float [B, S], an input of the compiled function by this name (an argument or a key of a dict):
            at position t the loss that a reference model has on the token that position t predicts. What stands where
            there is no label is not read.
    """
    copied: Tensor = torch.ops.cggr.carry(labels, reference_loss)
    return copied
