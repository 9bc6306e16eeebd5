"""GRPO's ``top_entropy_quantile``: gradient rows for the tokens that TRL keeps, and a count of those that have none."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from cggr_compile.integrations.selective_training import SelectiveTraining

# With several processes TRL takes the quantile over the tokens of all, a graph over its own: more rows make up for it.
MARGIN = 1.25
# Of a GRPO trainer: what computes the values of a batch, and what makes a mask of the entropies.
VALUES, MASK = "_get_per_token_logps_and_entropies", "get_high_entropy_mask"


def kept_by_entropy(trainer: Any) -> dict[str, Any] | None:
    """Options that give rows to the tokens which a GRPO trainer keeps; None where others have a gradient as well.

    These have: a penalty on the divergence from a reference (``beta``), ratios of whole sequences
    (``importance_sampling_level``). Of conversations with tools the quantile is one over tokens that the model is not
    told apart; and who has put another loss or mask into the trainer keeps what he likes.

    The tokens lie all over the completion: context in front of each would be nearly all of it, so there is none.
    """
    module = sys.modules.get("trl.trainer.grpo_trainer")
    base: Any = getattr(module, "GRPOTrainer", None)
    if base is None or not isinstance(trainer, base) or trainer.top_entropy_quantile == 1.0:
        return None
    kind = type(trainer)
    if any(getattr(kind, name) is not getattr(base, name) for name in ("_compute_loss", VALUES, MASK)):
        return None
    if trainer.beta != 0.0 or trainer.importance_sampling_level != "token" or getattr(trainer, "tools", None):
        return None
    share = float(trainer.top_entropy_quantile)
    if trainer.accelerator.num_processes > 1:
        share = min(1.0, MARGIN * share)
    return {"top_entropy_quantile": share, "context": 0}


class KeptTokens:
    """Counts the tokens that a trainer keeps though they carry no gradient, on the device."""

    def __init__(self, trainer: Any, training: SelectiveTraining) -> None:
        self._training = training
        self._values, self._mask = getattr(trainer, VALUES), getattr(trainer, MASK)
        self._length = 0
        self._missed: Tensor | None = None  # int64 []
        setattr(trainer, VALUES, self._seen)
        setattr(trainer, MASK, self._counted)

    def missed(self) -> int:
        """How many, in all steps so far. Waits for the device."""
        return 0 if self._missed is None else int(self._missed)

    def _seen(self, model: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._length = input_ids.shape[1]
        return self._values(model, input_ids, *args, **kwargs)

    def _counted(self, entropies: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kept: Tensor = self._mask(entropies, *args, **kwargs)
        runtime = self._training.runtime
        rows = None if runtime is None else runtime.selected
        if torch.is_grad_enabled() and isinstance(rows, Tensor) and len(rows) == len(kept):
            # a completion's token has its values at the position in front of it
            first = self._length - kept.shape[1] - 1
            places = torch.where(rows < first, self._length, rows - first).clamp(max=kept.shape[1])
            carries = torch.zeros(len(kept), kept.shape[1] + 1, dtype=torch.bool, device=kept.device)
            carries = carries.scatter(1, places, True)[:, : kept.shape[1]]
            missed = (kept & ~carries).sum()
            self._missed = missed if self._missed is None else self._missed + missed
        return kept
