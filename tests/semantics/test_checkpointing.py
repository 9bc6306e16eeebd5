"""Activation checkpointing through the whole backend; its pass has tests of its own."""

from __future__ import annotations

from models import compiled, make_batch
from training import RATIO, check_against_reference, small


def test_checkpointing() -> None:
    model, batch = small(num_hidden_layers=3), make_batch()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False  # transformers' own warning about it would break the graph
    compiled(model, min_tokens_ratio=RATIO)
    for _ in range(2):
        check_against_reference(model, batch)
