"""Which sequences every training step sees: known beforehand from a seed, so that a run can stop and go on anywhere."""

from __future__ import annotations

import torch


def batch_order(sequences: int, batch: int, steps: int, seed: int) -> torch.Tensor:
    """Numbers of the sequences of every step, int64 [steps, batch]: shuffled epochs, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch // sequences)
    order = torch.cat([torch.randperm(sequences, generator=generator) for _ in range(epochs)])
    return order[: steps * batch].view(steps, batch)
