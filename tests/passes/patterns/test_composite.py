"""Attention written with heads folded into the sequences: what keys and values it has, its gradients, its masks."""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured
from models import HEADS, HIDDEN, SEQ, VOCAB, compiled, make_batch, slow_but
from reference import assert_same, backward, reference, shift
from torch import Tensor
from training import RATIO, complaints, metrics, picks

from cggr_compile.passes.facts import LayerStack
from cggr_compile.passes.nodes import shape_of

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
SLOPES = torch.linspace(0.1, 0.4, 2 * HEADS)[:, None, None] * torch.arange(SEQ)
ADDED = torch.full((SEQ, SEQ), torch.finfo(torch.float32).min).triu(1)


def fold(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])


def unfold(x: Tensor) -> Tensor:
    return x.view(-1, HEADS, *x.shape[1:])


def masked_before_folding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """XGLM's, TrOCR's."""
    k, v = models.keys_values(k, v)
    scores = unfold(torch.bmm(fold(q), fold(k).transpose(1, 2))) + ADDED
    scores = torch.max(scores, torch.tensor(torch.finfo(torch.float32).min))
    return unfold(torch.bmm(F.dropout(fold(scores).softmax(-1), 0.0), fold(v)))


def biased(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """BLOOM's: ALiBi is what the products are added to."""
    k, v = models.keys_values(k, v)
    keys = k.permute(0, 1, 3, 2).reshape(-1, k.shape[-1], k.shape[2])
    scores = torch.baddbmm(SLOPES, fold(q), keys, beta=1.0, alpha=0.3)
    return unfold(torch.bmm(fold((unfold(scores) + ADDED).softmax(-1)), fold(v)))


def folded_throughout(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    k, v = models.keys_values(k, v)
    scores = torch.bmm(fold(q), fold(k).permute(0, 2, 1)) + ADDED
    return unfold(scores.softmax(-1) @ fold(v))


WAYS = {"masked before": masked_before_folding, "biased": biased, "throughout": folded_throughout}


def captured_with(attend: Attend) -> Captured:
    model, ids = models.Decoder(attend, layers=1), make_batch()["input_ids"]
    return Captured(lambda ids: F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()), ids)


@pytest.mark.parametrize("name", WAYS)
def test_keys_and_values_are_those_before_the_folding(name: str) -> None:
    captured = captured_with(WAYS[name])
    assert captured.run("find_stack").matched
    (block,) = captured.ctx[LayerStack].blocks
    attention, size = block.attentions[0], HIDDEN // HEADS
    assert attention.kind == "softmax"
    assert shape_of(attention.key) == ((2, HEADS, size, SEQ) if name == "biased" else (2, HEADS, SEQ, size))
    assert shape_of(attention.value) == (2, HEADS, SEQ, size)
    assert (attention.key_dim, attention.value_dim) == (3 if name == "biased" else 2, 2)


def mixed_with_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Each token sees other heads' too: the axis that is summed over holds heads and tokens."""
    scores = torch.bmm(q.flatten(1, 2), k.flatten(1, 2).mT)
    return torch.bmm(scores.softmax(-1), v.flatten(1, 2)).view_as(q)


def folded_otherwise(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Features are folded with the sequences: no axis of a key has all tokens of one."""
    other = q.transpose(1, 2).reshape(-1, HEADS, q.shape[-1])
    return torch.bmm((other @ other.mT).softmax(-1), other).view(2, SEQ, HEADS, -1).transpose(1, 2)


@pytest.mark.parametrize("attend", [mixed_with_heads, folded_otherwise])
def test_must_not_match(attend: Attend) -> None:
    assert not captured_with(attend).run("find_stack").matched


@pytest.mark.parametrize("name", slow_but(["masked before", "biased"], WAYS))
def test_gradients(name: str) -> None:
    model, batch = models.Decoder(WAYS[name], layers=1), make_batch()

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(ids)[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))

    run = compiled(step, min_tokens_ratio=RATIO, scoring="random", selection="random", kv_gradient="stop")
    with complaints() as warned:
        got = backward(model, run(*batch.values()))
    assert metrics(model)["level"] == "routed" and not warned
    logits = lambda: model(batch["input_ids"])  # noqa: E731
    assert_same(got, reference(model, logits, shift(batch["labels"]), picks(model), kv_gradient="stop"))
