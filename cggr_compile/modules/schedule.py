"""The share of tokens in force, as a tensor: a schedule changes it from step to step without a new graph."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.schedule import confidence_factor


def curriculum_ratio(step: Tensor, min_ratio: float, warmup_steps: int) -> Tensor:
    """The share of tokens at ``step``: linear from 1.0 at step 0 to ``min_ratio`` at ``warmup_steps``, then constant.

    Args:
        step: int64 [].

    Returns:
        float32 [].
    """
    one = torch.ones((), device=step.device)
    progress = (step / warmup_steps).clamp(max=1.0) if warmup_steps else one
    return torch.lerp(one, one * min_ratio, progress)  # exact at both ends


def adjust_to_confidence(ratio: Tensor, confidence: Tensor, sensitivity: float) -> Tensor:
    """``ratio * (1 + sensitivity * (1 - 2 * confidence))``, at most 1.

    A mean top-1 probability of one half leaves the ratio alone; less of it keeps more tokens, more of it fewer, below
    the base ratio too.

    Args:
        ratio, confidence: float32 []. sensitivity: in [0, 1]: 0 never adjusts, 1 keeps twice as many at confidence 0.
    """
    adjusted: Tensor = ratio * confidence_factor(confidence, sensitivity)
    return adjusted.clamp(max=1.0)
