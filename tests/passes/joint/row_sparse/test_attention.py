"""Attention in the ways people write it: on rows, and the same loss and gradients as without the pass."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from row_sparse_comparison import compare


@pytest.fixture(autouse=True)
def _one_layer(monkeypatch):
    monkeypatch.setattr(models, "LAYERS", 1)


def shared_heads(q, k, v, mask=None):
    """Grouped-query attention: two key heads for four query heads."""
    k, v = k[:, :2], v[:, :2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


def dropped(q, k, v, mask=None):
    """Takes the mathematical form on the CPU."""
    k, v = k[:, :2], v[:, :2]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.2, enable_gqa=True)


def capped(q, k, v, mask=None):
    scores = 2 * torch.tanh(q @ k.mT / 6)
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -1e9)
    return F.dropout(scores.softmax(-1, dtype=torch.float32), 0.2) @ v


def decoder(attend, **kwargs):
    torch.manual_seed(0)
    return models.Decoder(attend, fused=False, **kwargs)


def loss_on(batch):
    return lambda model: F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize(
    ("attend", "kv_gradient"),
    [
        (shared_heads, "stop"),
        (capped, "project"),
        pytest.param(shared_heads, "project", marks=pytest.mark.slow),
        pytest.param(capped, "stop", marks=pytest.mark.slow),
    ],
)
def test_on_rows(attend, kv_gradient):
    record = compare(lambda: decoder(attend), loss_on(models.make_batch()), kv_gradient=kv_gradient)
    assert record.details["densified"] == {} and not record.details["dense_attention"]


def test_mathematical_form_with_dropout():
    record = compare(lambda: decoder(dropped), loss_on(models.make_batch()), kv_gradient="stop")
    assert record.details["densified"] == {} and not record.details["dense_attention"]


def test_shared_heads_within_documents():
    make = lambda: decoder(shared_heads, documents=True)  # noqa: E731
    record = compare(make, loss_on(models.make_batch()), kv_gradient="stop")
    assert record.details["densified"] == {} and not record.details["dense_attention"]


@pytest.mark.slow
def test_one_sequence():
    record = compare(lambda: decoder(capped), loss_on(models.make_batch(1)))
    assert record.details["densified"] == {} and not record.details["dense_attention"]


def test_sizes_that_coincide():
    """Sequences, positions, slots and heads are four each."""
    record = compare(lambda: decoder(capped), loss_on(models.make_batch(4, 4)), min_tokens_ratio=0.99)
    assert record.details["densified"] == {} and not record.details["dense_attention"]
