"""Evaluation, generation, checkpoints, several models."""

from __future__ import annotations

import copy

import models
import pytest
import torch
import torch.nn.functional as F
from models import SEQ, VOCAB, PlainLM, compiled, make_batch
from reference import assert_same, backward, dense, eager_call, hf_reference
from training import RATIO, check_against_reference, complaints, metrics, picks, selected, small

import cggr_compile


@pytest.mark.parametrize(
    ("training", "grad"),
    [
        (False, False),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
    ids=["eval", "train without gradient", "eval with gradient"],
)
def test_evaluation_is_untouched_inductor(training: bool, grad: bool) -> None:
    model, batch = PlainLM(), make_batch()
    plain = copy.deepcopy(model)
    plain.compile()
    compiled(model, min_tokens_ratio=RATIO, compiler="inductor")
    model.train(training), plain.train(training)
    with torch.set_grad_enabled(grad), complaints() as heard:
        got, want = model(**batch), plain(**batch)
        assert got.logits.shape == (2, SEQ, VOCAB)
        assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)
        if not grad:
            got, want = model(batch["input_ids"]), plain(batch["input_ids"])
            assert got.loss is None and torch.equal(got.logits, want.logits)
    assert not heard, heard


def test_train_eval_train() -> None:
    model, batch = PlainLM(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    check_against_reference(model, batch)
    step = metrics(model)["step"]

    model.eval()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            output = model(**batch)
            want = eager_call(model, **batch)
        torch.testing.assert_close(output.loss, want.loss)
        torch.testing.assert_close(output.logits, want.logits)
    assert metrics(model)["step"] == step

    model.train()
    check_against_reference(model, batch)
    assert metrics(model)["step"] == step + 1


@pytest.mark.parametrize("first", [True, False], ids=["train first", "eval first"])
def test_a_model_that_does_not_read_its_mode(first: bool) -> None:
    """Nothing in it depends on train() or eval(), so Dynamo alone would let either run the other's graph."""
    model, ids = Model(), make_batch()["input_ids"]
    compiled(model, min_tokens_ratio=RATIO, selection="random")
    want = eager_call(model, ids)
    for training in (first, not first):
        model.train(training)
        loss = model(ids)
        assert (loss.item() == pytest.approx(want.item(), rel=1e-5)) == (not training)
        assert metrics(model)["step"] == (training or first)
    assert sorted(report.matched for report in cggr_compile.runtime(model).reports) == [False, True]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = models.Decoder(layers=1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.decoder(ids)[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))


def test_training_without_labels() -> None:
    """Logits for a loss outside of the compiled region: the dense model, and its gradient."""
    model, batch = PlainLM(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, fallback="silent")
    logits = model(batch["input_ids"]).logits
    assert logits.shape == (2, SEQ, VOCAB)
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), batch["labels"][:, 1:].reshape(-1))
    assert_same(backward(model, loss), dense(model, batch))


def test_generate() -> None:
    model, batch = small(num_hidden_layers=1), make_batch()
    plain = copy.deepcopy(model).eval()
    compiled(model, min_tokens_ratio=RATIO)
    model(**batch).loss.backward()
    prompt = batch["input_ids"][:, :5]
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model.eval()
    with complaints() as heard:
        assert torch.equal(model.generate(prompt, **settings), plain.generate(prompt, **settings))
    assert not heard, heard


def test_state_dict_is_the_models_own() -> None:
    model, batch = PlainLM(), make_batch()
    keys = list(model.state_dict())
    compiled(model, min_tokens_ratio=RATIO)
    assert list(model.state_dict()) == keys
    model(**batch).loss.backward()
    assert list(model.state_dict()) == keys
    assert {n for n, _ in model.named_buffers()} == {n for n, _ in PlainLM().named_buffers()}
    PlainLM().load_state_dict(model.state_dict())


def test_torch_compile_wrapper() -> None:
    """torch.compile(model) instead of model.compile(): the runtime is found from either object."""
    model, batch = PlainLM(), make_batch()
    wrapped = compiled(model, in_place=False, min_tokens_ratio=RATIO)
    got = backward(model, wrapped(**batch).loss)
    assert_same(got, hf_reference(model, batch, picks(wrapped)))


def test_two_models_have_two_runtimes() -> None:
    first, second, batch = PlainLM(), small(num_hidden_layers=1), make_batch()
    compiled(first, min_tokens_ratio=RATIO)
    compiled(second, min_tokens_ratio=0.5)
    first(**batch).loss.backward()
    before = selected(first)
    second(**batch).loss.backward()
    second(**batch).loss.backward()
    assert torch.equal(selected(first), before)
    assert tuple(selected(second).shape) == (2, SEQ // 2)
    assert (metrics(first)["step"], metrics(second)["step"]) == (1, 2)
