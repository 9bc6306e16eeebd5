from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F

import cggr_compile

EAGER = {"compiler": "eager", "fallback": "error"}


def test_step_that_returns_the_loss():
    model, batch = models.PlainLM(), models.make_batch()

    @cggr_compile.train_step(min_tokens_ratio=0.5, **EAGER)
    def step(model, batch):
        return model(**batch).loss

    step(model, batch).backward()
    metrics = cggr_compile.runtime(model).metrics()
    assert metrics["matched"] and metrics["tokens_selected"] == 16
    assert all(p.grad is not None for p in model.parameters())


def test_step_that_trains():
    model, batch = models.PlainLM(), models.make_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.lm_head.weight.detach().clone()

    @cggr_compile.train_step(compiler="eager")
    def step(model, optimizer, batch):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    losses = [step(model, optimizer, batch).item() for _ in range(8)]
    assert cggr_compile.runtime(model).metrics()["step"] == 8
    assert cggr_compile.runtime(model).metrics()["matched"]
    assert not torch.equal(before, model.lm_head.weight) and min(losses[-3:]) < losses[0]


def test_loss_outside_the_model():
    decoder, batch = models.Decoder(layers=1), models.make_batch()

    @cggr_compile.train_step(**EAGER)
    def step(ids, labels):
        return F.cross_entropy(decoder(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    step(batch["input_ids"], batch["labels"]).backward()
    assert cggr_compile.runtime(decoder).metrics()["matched"]


def test_bare_decorator(monkeypatch):
    decorated = cggr_compile.train_step(lambda x: x * 2)
    assert torch.equal(decorated(torch.ones(2)), torch.full((2,), 2.0))


def test_options_are_checked_at_decoration():
    with pytest.raises(ValueError, match="did you mean 'min_tokens_ratio'"):
        cggr_compile.train_step(min_tokens_rato=0.5)
