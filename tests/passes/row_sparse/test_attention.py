"""Attention in the ways people write it: on rows, and the same loss and gradients as without the pass."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from row_sparse_comparison import compare

POSITIONS = {"aten.sum.dim_IntList": 1}  # learned positions: a sum over sequences alone


@pytest.fixture(autouse=True)
def _two_layers(monkeypatch):
    monkeypatch.setattr(models, "LAYERS", 2)


def shared_heads(q, k, v, mask=None):
    """Grouped-query attention: two key heads for four query heads."""
    k, v = k[:, :2], v[:, :2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


def window(q, k, v, mask=None):
    position = torch.arange(q.shape[2])
    distance = position[:, None] - position
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < 4))


def additive(q, k, v, mask=None):
    """A bias that differs between heads (ALiBi)."""
    position = torch.arange(q.shape[2])
    distance = position[:, None] - position
    slopes = torch.tensor([1.0, 0.5, 0.25, 0.125])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(distance < 0, -torch.inf, distance * -slopes))


def dropped(q, k, v, mask=None):
    """Takes the mathematical form on the CPU."""
    k, v = k[:, :2], v[:, :2]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.2, enable_gqa=True)


def capped(q, k, v, mask=None):
    scores = 2 * torch.tanh(q @ k.mT / 6)
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -1e9)
    return F.dropout(scores.softmax(-1, dtype=torch.float32), 0.2) @ v


def grouped(q, k, v, mask=None):
    """Five axes: [B, key heads, group, S, D]."""
    k, v = k[:, :2, None], v[:, :2, None]
    scores = q.unflatten(1, (2, 2)) @ k.mT / 3
    scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return (scores.softmax(-1) @ v).flatten(1, 2)


def decoder(attend, **kwargs):
    torch.manual_seed(0)
    return models.Decoder(attend, fused=False, **kwargs)


def loss_on(batch):
    return lambda model: F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize("kv_gradient", ["stop", "project"])
@pytest.mark.parametrize("attend", [shared_heads, dropped, capped, grouped])
def test_on_rows(attend, kv_gradient):
    record = compare(lambda: decoder(attend), loss_on(models.make_batch()), kv_gradient=kv_gradient)
    assert record.details["densified"] == POSITIONS and not record.details["dense_attention"]


@pytest.mark.parametrize("attend", [window, additive])
def test_masks(attend):
    record = compare(lambda: decoder(attend), loss_on(models.make_batch()), kv_gradient="stop")
    assert record.details["densified"] == POSITIONS and not record.details["dense_attention"]


def test_shared_heads_within_documents():
    make = lambda: decoder(shared_heads, documents=True)  # noqa: E731
    record = compare(make, loss_on(models.make_batch()), kv_gradient="stop")
    assert record.details["densified"] == POSITIONS and not record.details["dense_attention"]


@pytest.mark.parametrize("attend", [shared_heads, window, grouped])
def test_one_sequence(attend):
    record = compare(lambda: decoder(attend), loss_on(models.make_batch(1)), kv_gradient="stop")
    assert record.details["densified"] == {} and not record.details["dense_attention"]


@pytest.mark.parametrize("attend", [shared_heads, capped])
def test_sizes_that_coincide(attend):
    """Sequences, positions and heads are four each, and so is the number of slots."""
    record = compare(lambda: decoder(attend), loss_on(models.make_batch(4, 4)), min_tokens_ratio=0.99)
    assert record.details["densified"] == POSITIONS and not record.details["dense_attention"]
