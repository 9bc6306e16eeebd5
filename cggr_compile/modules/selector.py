"""What the loss and the scorer have in common: score, ratio in force, selection, metrics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cggr_compile.modules.schedule import adjust_to_confidence, curriculum_ratio
from cggr_compile.modules.selection import token_mask
from cggr_compile.modules.settings import Settings
from cggr_compile.ops.difficulty import difficulty as difficulty_of
from cggr_compile.ops.metrics import STAT_NAMES, stats
from cggr_compile.ops.score_logits import score_logits
from cggr_compile.selections import SELECTIONS


class Selected(NamedTuple):
    """What was selected. difficulty, confidence (top-1 probability), entropy: float32 [B, S]; mask: bool [B, S];
    ratio, the share in force: float32 []."""

    difficulty: Tensor
    mask: Tensor
    confidence: Tensor
    entropy: Tensor
    ratio: Tensor


class TokenSelector(nn.Module):
    """Base of modules that score tokens and select some of them.

    Nothing in a forward waits for the device and no shape depends on data, so a compiled forward is one graph.

    Attributes:
        step_count: int64 [], a buffer: the steps counted by :meth:`step`.
    """

    step_count: Tensor

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("step_count", torch.zeros((), dtype=torch.int64))
        self._figures: Tensor | None = None

    def step(self) -> None:
        """Count a training step; call it after ``optimizer.step()``."""
        self.step_count += 1

    def get_metrics(self) -> dict[str, Any]:
        """Figures of the last forward; empty before the first. The only call that waits for the device.

        Keys: step; token_ratio, the share in force; tokens_selected; tokens_total (candidates); avg_confidence,
        avg_entropy, avg_difficulty over the candidates; selection; scoring.
        """
        if self._figures is None:
            return {}
        ratio, *numbers = self._figures.tolist()
        values = dict(zip(STAT_NAMES, numbers, strict=True))
        for name in ("tokens_selected", "tokens_total"):
            values[name] = int(values[name])
        kinds = {"selection": self.settings.selection, "scoring": self.settings.scoring}
        return {"step": int(self.step_count), "token_ratio": ratio, **values, **kinds}

    @torch.no_grad()
    def select(self, logits: Tensor, labels: Tensor | None, valid: Tensor) -> Selected:
        """Score and select, without gradient.

        Args:
            logits: [B, S, V]. valid: bool [B, S], the candidates.
            labels: int64 [B, S], aligned with the logits. None where the next token is not to be known: -log p(label)
                is then replaced by its expectation under p, the entropy.
        """
        settings = self.settings
        known = labels if labels is not None else torch.full(valid.shape, -100, device=valid.device)
        logsumexp, entropy, top1, top2, label_logprob = score_logits(logits, known)
        if labels is None:
            label_logprob = -entropy
        difficulty = difficulty_of(entropy, top1, top2, label_logprob, settings.scoring, logsumexp=logsumexp)
        # a module left on the CPU lends its step as a scalar
        step = torch.zeros((), dtype=torch.int64, device=logits.device) + self.step_count
        ratio = curriculum_ratio(step, settings.min_tokens_ratio, settings.warmup_steps)
        if settings.dynamic_threshold and SELECTIONS[settings.selection].follows_confidence:
            confidence = top1.masked_fill(~valid, 0.0).sum() / valid.sum().clamp(min=1)
            ratio = adjust_to_confidence(ratio, confidence, settings.threshold_sensitivity)
        mask = token_mask(settings.selection, difficulty, valid, ratio, step, settings)
        self._figures = torch.cat((ratio[None], stats(mask, valid, top1, entropy, difficulty)))
        return Selected(difficulty, mask, top1, entropy, ratio)
