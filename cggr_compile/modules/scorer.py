"""``CGGRScorer``: a mask of the difficult tokens, before the model runs."""

from __future__ import annotations

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cggr_compile.modules.router import logits_of, predicts_masked_tokens
from cggr_compile.modules.selector import TokenSelector
from cggr_compile.modules.settings import Arguments, Settings, takes_settings
from cggr_compile.options import OptionError


class CGGRScorer(TokenSelector):
    """Scores tokens with a router and selects the difficult ones as a mask of static shape.

    For a model that routes by itself: ``expert(x) * mask[..., None]`` sends easy tokens to no expert.

    Args:
        router: ``(input_ids, **kwargs)`` -> logits, or an output with ``.logits``: a :class:`TruncatedRouter` or any
            language model. It is used and not owned: parameters(), state_dict() and to() leave it out.
        **settings: scoring, selection and others: the fields of :class:`cggr_compile.modules.settings.Settings`.

    Raises:
        ValueError: for an argument out of range.
    """

    @takes_settings(
        *("scoring", "min_tokens_ratio", "warmup_steps", "dynamic_threshold", "threshold_sensitivity"),
        *("selection", "num_strata", "min_tokens_per_sequence"),
    )
    def __init__(self, router: nn.Module, **settings: Unpack[Arguments]) -> None:
        super().__init__(Settings(**settings))
        if not callable(router):
            raise OptionError(f"router must be a module, got {type(router).__name__}")
        self._router = (router,)  # in a tuple, out of sight of nn.Module
        shifts = getattr(router, "shifts_labels", None)
        self.shifts_labels = not predicts_masked_tokens(router) if shifts is None else bool(shifts)

    @property
    def router(self) -> nn.Module:
        return self._router[0]

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Score every token, without gradient and without waiting for the device.

        Args:
            input_ids: int64 [B, S].
            targets: int64 [B, S], labels as the model takes them: unshifted for a causal model, whose position t is
                scored with the label at t + 1; -100 (and the last position of a causal model) is no candidate. None:
                every position is one, and -log p(label) is replaced by its expectation, the entropy. So without
                targets no score looks at a later token: a mask that steers the forward must not tell it the answer.
            **kwargs: passed to the router. Positions that a 2-d ``attention_mask`` excludes are no candidates.

        Returns:
            difficulty: float32 [B, S].
            mask: bool [B, S], True for the selected tokens.
            info: confidence (top-1 probability) and entropy, float32 [B, S]; current_ratio, float32 []; tokens_selected
            and tokens_total (candidates), int64 [].

        Raises:
            ValueError: for other shapes.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must have shape [B, S], got {tuple(input_ids.shape)}")
        if targets is not None and targets.shape != input_ids.shape:
            raise ValueError(
                f"targets must match input_ids: shape {tuple(input_ids.shape)}, got {tuple(targets.shape)}"
            )
        logits = logits_of(self.router(input_ids, **kwargs))
        if logits.dim() != 3 or logits.shape[:2] != input_ids.shape:
            raise ValueError(
                f"router must return logits [B, S, V] for input_ids {tuple(input_ids.shape)}, got {tuple(logits.shape)}"
            )
        if targets is not None and self.shifts_labels:
            targets = F.pad(targets, (0, 1), value=-100)[:, 1:]
        valid = torch.ones_like(input_ids, dtype=torch.bool) if targets is None else targets != -100
        attention_mask = kwargs.get("attention_mask")
        if attention_mask is not None and attention_mask.shape == input_ids.shape:
            valid = valid & (attention_mask != 0)
        chosen = self.select(logits, targets, valid)
        info = {
            "confidence": chosen.confidence,
            "entropy": chosen.entropy,
            "current_ratio": chosen.ratio,
            "tokens_selected": chosen.mask.sum(),
            "tokens_total": valid.sum(),
        }
        return chosen.difficulty, chosen.mask, info
