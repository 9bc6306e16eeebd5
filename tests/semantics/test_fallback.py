"""Models that do not match run as they are."""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, compiled, make_batch
from reference import assert_same, backward, reference, shift
from torch import Tensor, nn
from training import RATIO, complaints, cross_entropy_and, metrics, picks


def mlp_step() -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 5))

    def step(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(x), labels)

    return model, step


def test_fallback_warns_once_and_is_plain() -> None:
    model, step = mlp_step()
    with complaints() as heard:
        run = compiled(step, min_tokens_ratio=RATIO, fallback="warn")
        for size in (4, 6, 4):
            x, labels = torch.randn(size, 8), torch.randint(0, 5, (size,))
            assert_same(backward(model, run(x, labels)), backward(model, step(x, labels)))
    assert len(heard) == 1, heard
    assert metrics(model)["matched"] is False
    assert metrics(model)["fallback_reason"]


def test_fallback_silent() -> None:
    model, step = mlp_step()
    with complaints() as heard:
        run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
        x, labels = torch.randn(4, 8), torch.randint(0, 5, (4,))
        assert_same(backward(model, run(x, labels)), backward(model, step(x, labels)))
    assert not heard, heard


def test_fallback_error() -> None:
    _, step = mlp_step()
    run = compiled(step, min_tokens_ratio=RATIO, fallback="error")
    with pytest.raises(Exception, match="unsupported layers: no token embedding"):
        run(torch.randn(4, 8), torch.randint(0, 5, (4,)))


def test_stack_without_attention_is_never_wrong() -> None:
    """A recurrent model mixes tokens where no attention is: routing would not be the gradient we define."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(VOCAB, 16), "head": nn.Linear(16, VOCAB)})

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        logits = logits_of(ids)
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))

    def logits_of(ids: Tensor) -> Tensor:
        x = model["embed"](ids)
        for _ in range(3):  # position t sees the mean of the past
            x = x + torch.tanh(x.cumsum(1) / 8)
        return model["head"](x)

    batch = make_batch()
    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    ids, labels = batch["input_ids"], batch["labels"]
    got = backward(model, run(ids, labels))
    assert metrics(model)["level"] == "loss"
    assert_same(got, reference(model, lambda: logits_of(ids), shift(labels), picks(model), gradient="exact"))


class Convolved(models.Decoder):
    """A causal convolution over tokens in every block, beside attention."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.in_proj = nn.Identity()  # where the reference stops the gradient
            block.conv = nn.Conv1d(models.HIDDEN, models.HIDDEN, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
            mixed = block.conv(F.pad(block.in_proj(x).transpose(1, 2), (2, 0))).transpose(1, 2)
            x = x + 0.1 * mixed
        return self.lm_head(self.ln_f(x))


def test_tokens_mixed_outside_attention_are_never_wrong() -> None:
    """Rewritten, it must equal the reference, which gates what the convolutions read; else it is the dense model."""
    model, batch = Convolved(), make_batch()

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_and(lambda _: torch.zeros(()))(model(ids), labels)

    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, run(batch["input_ids"], batch["labels"]))
    if metrics(model)["matched"]:
        want = reference(model, lambda: model(batch["input_ids"]), shift(batch["labels"]), picks(model))
    else:
        want = backward(model, step(batch["input_ids"], batch["labels"]))
    assert_same(got, want)
