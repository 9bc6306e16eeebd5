"""Small programs that the pass tests capture."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured


class Step:
    """Model and loss of one training step, written without any library."""

    def __init__(self, decoder: Any, **loss: Any) -> None:
        self.decoder, self.loss = decoder, loss

    def __call__(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.decoder(ids)
        return F.cross_entropy(logits[:, :-1].reshape(-1, models.VOCAB), labels[:, 1:].reshape(-1), **self.loss)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return models.make_batch()


@pytest.fixture
def decoder_step(batch):
    """Captured step of our own decoder; keyword arguments go to the cross-entropy, ``options`` to the backend."""

    def capture(options: dict[str, Any] | None = None, decoder: Any = None, **loss: Any) -> Captured:
        step = Step(decoder or models.Decoder(), **loss)
        return Captured(step, batch["input_ids"], batch["labels"], options=options)

    return capture
