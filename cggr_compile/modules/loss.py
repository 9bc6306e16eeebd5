"""``CGGRLoss``: a loss over the difficult tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from cggr_compile.modules.selector import TokenSelector
from cggr_compile.modules.settings import Arguments, Settings, takes_settings
from cggr_compile.options import OptionError
from cggr_compile.selections import SELECTIONS


class CGGRLoss(TokenSelector):
    """The mean loss of the selected tokens.

    Takes the place of ``nn.CrossEntropyLoss`` in a training loop; :meth:`step` follows ``optimizer.step()``. The
    logits exist already, so it saves no arithmetic in the model: the backend does.

    Args:
        **settings: scoring, selection and others: the fields of :class:`cggr_compile.modules.settings.Settings`. A
            warning says so where the selection takes a biased sample, as all but ``stratified`` do.
        base_loss: ``(logits [N, V], targets [N]) -> [N]``, the loss of every token; None for the cross-entropy. Its
            ``ignore_index``, or -100 if it has none, marks targets that are no candidates; it is called with 0 there.

    Raises:
        ValueError: for an argument out of range.
    """

    @takes_settings(
        *("scoring", "selection", "dynamic_threshold", "threshold_sensitivity"),
        *("min_tokens_ratio", "warmup_steps", "num_strata", "min_tokens_per_sequence"),
    )
    def __init__(
        self, *, base_loss: Callable[[Tensor, Tensor], Tensor] | None = None, **settings: Unpack[Arguments]
    ) -> None:
        super().__init__(Settings(**settings))
        if base_loss is not None and not callable(base_loss):
            raise OptionError(f"base_loss must be None or callable, got {base_loss!r}")
        reduction = getattr(base_loss, "reduction", "none")
        if reduction != "none":
            raise OptionError(f"base_loss must have reduction='none', got {reduction!r}")
        self.base_loss: Any = base_loss or nn.CrossEntropyLoss(reduction="none")
        self.ignore_index = int(getattr(base_loss, "ignore_index", -100))
        selection = self.settings.selection
        if not SELECTIONS[selection].sampled:
            warnings.warn(
                f"selection={selection!r} trains on a biased sample, without weights: the model unlearns what it is "
                "not shown (the most difficult tokens, from scratch: a held-out loss of 4.95 to 6.47 where random ones "
                "reached 3.42). selection='stratified' has no such bias.",
                stacklevel=3,
            )

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss, a scalar; 0 with zero gradients where no target is a candidate.

        Args:
            logits: [B, S, V], or [N, V] for one sequence.
            targets: int64 [B, S] or [N], aligned with the logits as for ``nn.CrossEntropyLoss``: a language model's
                labels have to be shifted by the caller, ``criterion(logits[:, :-1], labels[:, 1:])``.

        Raises:
            ValueError: for other shapes; or if ``base_loss`` does not return a value per token.
        """
        if logits.dim() not in (2, 3):
            raise ValueError(f"Unsupported logits shape {tuple(logits.shape)}: logits must be [B, S, V] or [N, V]")
        if targets.shape != logits.shape[:-1]:
            raise ValueError(
                f"logits shape {tuple(logits.shape)} does not match targets shape {tuple(targets.shape)}: targets must "
                f"be {tuple(logits.shape[:-1])}"
            )
        valid = targets != self.ignore_index
        rows = (1, *targets.shape) if targets.dim() == 1 else targets.shape
        chosen = self.select(logits.view(*rows, -1), targets.view(rows), valid.view(rows))
        flat = logits.reshape(-1, logits.shape[-1])
        losses = self.base_loss(flat, targets.masked_fill(~valid, 0).reshape(-1))
        if losses.shape != flat.shape[:1]:
            raise ValueError(
                f"base_loss must return a loss per token, shape {tuple(flat.shape[:1])}, got {tuple(losses.shape)}"
            )
        mask = chosen.mask.reshape(-1)
        return torch.where(mask, losses, 0.0).sum() / mask.sum().clamp(min=1)
