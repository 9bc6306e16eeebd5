"""Padding on either side, or scattered: causal attention stays right, padding is never trained on."""

from __future__ import annotations

import math

import pytest
import torch
from models import SEQ, compiled, family
from reference import assert_same, backward, candidates, dense, shift
from training import RATIO, check_against_reference, padded, selected, small


@pytest.mark.parametrize(
    ("side", "padding", "kv_gradient"),
    [
        ("right", "auto", "stop"),
        ("right", "right", "project"),
        ("right", "any", "project"),
        ("left", "auto", "stop"),
        ("left", "any", "project"),
        ("holes", "auto", "project"),
    ],
)
def test_padding(side: str, padding: str, kv_gradient: str) -> None:
    model, batch = small(), padded(side)
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
    model, batch = family(name), padded(side)
    compiled(model, min_tokens_ratio=RATIO)
    check_against_reference(model, batch)


def test_padding_whose_labels_are_not_ignored() -> None:
    """A careless collator: labels = input_ids. Padding is still no candidate: attention_mask says so."""
    model, batch = small(), padded("left", ignored_labels=False)
    compiled(model, min_tokens_ratio=0.9)
    check_against_reference(model, batch)
    valid = candidates(shift(batch["labels"]))
    assert int((selected(model) >= 0).sum()) == int(valid.sum().clamp_max(2 * math.ceil(0.9 * SEQ)))
    assert all(valid[b, i] for b, row in enumerate(selected(model).tolist()) for i in row if i >= 0)


@pytest.mark.parametrize("first", ["full", "right"])
def test_padding_of_another_kind_in_a_later_batch(first: str) -> None:
    """What `auto` concluded from the first batch must not make a later one silently wrong."""
    model = small()
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
    model, batch = small(), padded("left")
    compiled(model, min_tokens_ratio=RATIO, padding="right")
    with pytest.raises(RuntimeError, match=r"(?i)padding"):
        backward(model, model(**batch).loss)


@pytest.mark.parametrize("seq", [12, 13])
def test_padding_at_ratio_one(seq: int) -> None:
    for side in ("right", "left"):
        model, batch = small(), padded(side, seq=seq)
        compiled(model, min_tokens_ratio=1.0)
        assert_same(backward(model, model(**batch).loss), dense(model, batch))
