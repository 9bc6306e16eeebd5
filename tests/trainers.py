"""What the tests of trainers share: data, arguments, models of two sizes, and the batches that a trainer has seen."""

from __future__ import annotations

from typing import Any

import models
import torch
from torch import Tensor

OPTIONS = {"compiler": "eager", "fallback": "error", "selection": "importance", "launch_bound": "select"}
LENGTHS = (models.SEQ,)


class Tokens(torch.utils.data.Dataset):
    """Random sequences; of every one the first quarter has no label."""

    def __init__(self, size: int = 24, lengths: tuple[int, ...] = LENGTHS) -> None:
        self.size, self.lengths = size, lengths

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        length = self.lengths[i // 2 % len(self.lengths)]  # batches of two have one length
        ids = torch.randint(1, models.VOCAB, (length,), generator=torch.Generator().manual_seed(i))
        labels = ids.clone()
        labels[: length // 4] = models.IGNORE
        return {"input_ids": ids, "labels": labels}


class Collator:
    """Stacks examples, and keeps the batches that it made."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {key: torch.stack([example[key] for example in examples]) for key in examples[0]}
        self.batches.append(batch)
        return {**batch}


def plain() -> models.PlainLM:
    torch.manual_seed(0)
    return models.PlainLM()


def llama(**overrides: Any) -> Any:
    return models.family("llama", num_hidden_layers=1, **overrides)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(left: dict[str, Tensor], right: dict[str, Tensor], atol: float = 1e-6) -> bool:
    return left.keys() == right.keys() and all(torch.allclose(left[k], right[k], atol=atol) for k in left)
