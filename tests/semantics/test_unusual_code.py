"""Code as people write it: operations in place, one block in every layer."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, compiled, make_batch
from reference import backward
from torch import Tensor
from training import RATIO, assert_selected_or_dense


class Edited(models.Decoder):
    """A decoder that changes tensors in place, in one of several ways."""

    def __init__(self, edit: str) -> None:
        super().__init__(tied=False)
        self.edit = edit
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("level", torch.zeros(()))

    def residual(self, x: Tensor) -> Tensor:
        if self.edit == "method":  # the result of add_ is not used
            x.add_(0.5 * x.tanh())
        elif self.edit == "view":
            x[..., :8].mul_(0.5)
        elif self.edit == "setitem":
            x = x.clone()
            x[..., :8] = 0.5 * x[..., 8:16]
        elif self.edit == "function":
            x = x.clone()
            F.relu_(x[..., :8])
        elif self.edit == "out":
            buffer = torch.zeros_like(x)
            buffer.copy_(x)
            x = buffer
        elif self.edit in ("metric", "feedback"):
            self.level.copy_(x.detach().abs().mean())
            x = x + self.level if self.edit == "feedback" else x
        return x

    def forward(self, ids: Tensor) -> Tensor:
        if self.edit == "counter":
            self.calls.add_(1)
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = self.residual(block(x))
        logits = self.lm_head(self.ln_f(x))
        if self.edit == "logits":
            logits.div_(2.0)
        elif self.edit == "logits-view":
            logits[..., :5].sub_(3.0)
        return logits


@pytest.mark.parametrize("ratio", [RATIO, 1.0])
@pytest.mark.parametrize(
    "edit",
    ["method", "view", "setitem", "function", "out", "counter", "metric", "feedback", "logits", "logits-view"],
)
def test_operations_in_place(edit: str, ratio: float) -> None:
    """Nothing that mutates a tensor may be lost as dead code, nor move across what reads the tensor."""
    model, batch = Edited(edit), make_batch()
    args = batch["input_ids"], batch["labels"]

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(ids)
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))

    run = compiled(step, min_tokens_ratio=ratio, fallback="silent")
    for _ in range(2):
        got = backward(model, run(*args))
    assert int(model.calls) == (2 if edit == "counter" else 0)
    assert (model.level > 0) == (edit in ("metric", "feedback"))
    assert_selected_or_dense(got, model, batch, lambda: model(args[0]), lambda: step(*args))


class Squared(torch.autograd.Function):
    """Its backward pass writes in place; nobody reads what the write returns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad = grad.clone()
        grad.mul_(2 * x)
        return grad


@pytest.mark.parametrize("ratio", [RATIO, 1.0])
def test_operations_in_place_in_the_backward_pass(ratio: float) -> None:
    model, batch = models.Decoder(layers=1), make_batch()
    model.wte.register_forward_hook(lambda module, args, out: Squared.apply(out))
    args = batch["input_ids"], batch["labels"]

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(ids)[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))

    run = compiled(step, min_tokens_ratio=ratio, fallback="silent")
    got = backward(model, run(*args))
    assert_selected_or_dense(got, model, batch, lambda: model(args[0]), lambda: step(*args))


def test_one_block_used_again_and_again() -> None:
    """ALBERT's way: the same weights in every layer."""
    model, batch = models.Decoder(layers=3), make_batch()
    model.blocks[1] = model.blocks[2] = model.blocks[0]
    args = batch["input_ids"], batch["labels"]

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(ids)[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))

    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, run(*args))
    assert_selected_or_dense(got, model, batch, lambda: model(args[0]), lambda: step(*args))
