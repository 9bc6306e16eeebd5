"""Inputs beyond one full sequence of tokens a row."""

from __future__ import annotations

import models
import torch
from models import SEQ, compiled, make_batch
from reference import assert_same, backward, dense, hf_reference
from training import RATIO, metrics, picks, small


def test_packed_documents() -> None:
    """Positions that restart, one row: attention stays inside documents, in the compiled model as eagerly."""
    model, batch = small(), make_batch(1)
    batch["position_ids"] = torch.cat([torch.arange(6), torch.arange(SEQ - 6)])[None]
    compiled(model, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, model(**batch, use_cache=False).loss)
    if metrics(model)["matched"]:
        assert_same(got, hf_reference(model, batch, picks(model)))
    else:
        assert_same(got, dense(model, {**batch, "use_cache": False}))


def test_embeddings_as_input() -> None:
    model, batch = small(), make_batch()
    embeds = torch.randn(2, SEQ, models.HIDDEN, generator=torch.Generator().manual_seed(2))
    inputs = {"inputs_embeds": embeds, "labels": batch["labels"]}
    compiled(model, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, model(**inputs).loss)
    if metrics(model)["matched"]:
        assert_same(got, hf_reference(model, inputs, picks(model)))
    else:
        assert_same(got, dense(model, inputs))
