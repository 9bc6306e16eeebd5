"""Padding on either side, or scattered: attention stays right, and what has a label counts, as it does in the model."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models import SEQ, VOCAB, compiled, family
from reference import assert_same, backward, candidates, dense, shift
from torch import Tensor
from training import RATIO, check_against_reference, metrics, padded, selected, small


@pytest.mark.parametrize(
    ("side", "padding", "kv_gradient"),
    [
        ("right", "auto", "stop"),
        ("right", "right", "project"),
        pytest.param("right", "any", "project", marks=pytest.mark.slow),
        ("left", "auto", "stop"),
        pytest.param("left", "any", "project", marks=pytest.mark.slow),
        ("holes", "auto", "project"),
    ],
)
def test_padding(side: str, padding: str, kv_gradient: str) -> None:
    model, batch = small(num_hidden_layers=1), padded(side)
    compiled(model, min_tokens_ratio=RATIO, padding=padding, kv_gradient=kv_gradient)
    for _ in range(2):
        check_against_reference(model, batch, kv_gradient=kv_gradient)
        chosen = selected(model)
        valid = candidates(shift(batch["labels"]))
        for row, allowed in zip(chosen.tolist(), valid, strict=True):
            assert all(allowed[i] for i in row if i >= 0)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "llama-eager"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_in_other_families(side: str, name: str) -> None:
    model, batch = family(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 1}), padded(side)
    compiled(model, min_tokens_ratio=RATIO)
    check_against_reference(model, batch)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_whose_labels_are_not_ignored(side: str) -> None:
    """A careless collator: labels = input_ids. The model counts them, so they are candidates like any other."""
    model, batch = small(num_hidden_layers=1), padded(side, ignored_labels=False)
    compiled(model, min_tokens_ratio=0.9)
    check_against_reference(model, batch)
    valid = candidates(shift(batch["labels"]))
    assert int((selected(model) >= 0).sum()) == int(valid.sum(1).clamp_max(math.ceil(0.9 * SEQ)).sum())
    assert metrics(model)["tokens_total"] == int(valid.sum())


@pytest.mark.parametrize("side", [pytest.param("left", marks=pytest.mark.slow), "right", "holes"])
def test_labels_of_padding_are_those_of_the_model(side: str) -> None:
    model, batch = small(num_hidden_layers=1), padded(side, ignored_labels=False)
    compiled(model, selection="labels", max_selected=1.0, gradient="exact")
    assert_same(backward(model, model(**batch).loss), dense(model, batch))


def test_labels_of_padding_in_a_later_batch() -> None:
    """By then the mask is gone, and such a row would see other keys than in the model: asserted on the device."""
    model = small(num_hidden_layers=1)
    compiled(model, min_tokens_ratio=RATIO)
    check_against_reference(model, padded("right"))
    with pytest.raises(RuntimeError, match="labels mark a position where attention_mask is 0"):
        model(**padded("right", ignored_labels=False))


@pytest.mark.parametrize("where", ["returned", "in the loss"])
def test_a_mask_stays_where_more_than_the_loss_reads_padding(where: str) -> None:
    model, batch = small(num_hidden_layers=1), padded("right")

    def step(**batch: Tensor) -> tuple[Tensor, ...]:
        states = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        logits = model.lm_head(states)[:, :-1]
        loss = F.cross_entropy(logits.reshape(-1, VOCAB), batch["labels"][:, 1:].reshape(-1))
        extra = states.square().mean()
        return (loss, extra) if where == "returned" else (loss + extra,)

    run = compiled(step, selection="labels", max_selected=1.0, gradient="exact")
    assert_same(backward(model, sum(run(**batch))), backward(model, sum(step(**batch))))
    assert metrics(model)["matched"] is True


@pytest.mark.parametrize("first", ["full", "right"])
def test_padding_of_another_kind_in_a_later_batch(first: str) -> None:
    """What `auto` concluded from the first batch must not make a later one silently wrong."""
    model = small(num_hidden_layers=1)
    start = {**padded("right"), "attention_mask": torch.ones(2, SEQ, dtype=torch.long)}
    compiled(model, min_tokens_ratio=RATIO)
    check_against_reference(model, start if first == "full" else padded("right"))
    for side in ("right", "left"):
        try:
            check_against_reference(model, padded(side))
        except RuntimeError as error:
            assert side == "left" and "padding" in str(error).lower(), error
            model.zero_grad()


def test_broken_promise_of_right_padding_raises() -> None:
    model, batch = small(num_hidden_layers=1), padded("left")
    compiled(model, min_tokens_ratio=RATIO, padding="right")
    with pytest.raises(RuntimeError, match=r"(?i)padding"):
        backward(model, model(**batch).loss)


@pytest.mark.parametrize("seq", [12, pytest.param(13, marks=pytest.mark.slow)])
def test_padding_at_ratio_one(seq: int) -> None:
    for side in ("right", "left"):
        model, batch = small(num_hidden_layers=1), padded(side, seq=seq)
        compiled(model, min_tokens_ratio=1.0)
        assert_same(backward(model, model(**batch).loss), dense(model, batch))
