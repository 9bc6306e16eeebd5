"""Activation checkpointing."""

from __future__ import annotations

from models import compiled, make_batch
from reference import assert_same, backward, dense, hf_reference
from training import RATIO, metrics, selected, small


def test_checkpointing() -> None:
    model, batch = small(num_hidden_layers=3), make_batch()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiled(model, min_tokens_ratio=RATIO, fallback="silent")
    for _ in range(2):
        got = backward(model, model(**batch).loss)
        if metrics(model)["matched"]:
            assert_same(got, hf_reference(model, batch, selected(model)))
        else:
            assert metrics(model)["fallback_reason"]
            assert_same(got, dense(model, batch))
