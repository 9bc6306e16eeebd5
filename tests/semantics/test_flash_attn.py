"""Models of transformers with attn_implementation="flash_attention_2": the training that the same model has with sdpa.

By a stand-in for the package flash-attn (tests/flash_attn_stand_in.py), which has its operators but not its kernels.
"""

from __future__ import annotations

import flash_attn_stand_in
import models
import pytest
import torch
import torch.nn.functional as F
from reference import assert_same, backward, context_rows, dense
from training import complaints, metrics, padded

import cggr_compile

LENGTH = models.SEQ
BATCH = models.make_batch()
STARTS = [0, 5, 9]
POSITIONS = torch.cat([torch.arange(n) for n in (5, 4, 7)])[None]


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    flash_attn_stand_in.install(monkeypatch)


def family(name="llama", attention="flash_attention_2", layers=1, **config):
    return models.family(name, attn_implementation=attention, num_hidden_layers=layers, use_cache=False, **config)


def train(model, batch, **options):
    torch._dynamo.reset()
    models.compiled(model, **options)
    return backward(model, model(**batch).loss)


def row_sparse(model):
    return cggr_compile.runtime(model).reports[-1].record("row_sparse")


def packed():
    """One stream of three documents, as DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes it."""
    batch = models.make_batch(1)
    cumulative = [torch.tensor([*STARTS, LENGTH], dtype=torch.int32) for _ in range(2)]
    lengths = dict(cu_seq_lens_q=cumulative[0], cu_seq_lens_k=cumulative[1], max_length_q=7, max_length_k=7)
    return {**batch, "position_ids": POSITIONS, **lengths}


# heads are shared in all of them, and Mistral's see five keys
@pytest.mark.parametrize(
    ("name", "kv_gradient", "config"),
    [
        ("llama", "project", {"layers": 2}),
        ("mistral", "stop", {"sliding_window": 5}),
    ],
)
def test_same_training_as_by_sdpa(name, kv_gradient, config):
    models_of = [family(name, attention, **config) for attention in ("flash_attention_2", "flash_attention_2", "sdpa")]
    run, dense_backward, expected = (
        train(model, BATCH, kv_gradient=kv_gradient, row_sparse=on)
        for model, on in zip(models_of, (True, False, True), strict=True)
    )
    assert_same(run, dense_backward)
    assert_same(run, expected)
    assert row_sparse(models_of[0]).details["dense_attention"] == row_sparse(models_of[0]).details["densified"] == {}
    assert row_sparse(models_of[1]) is None


def test_packed_sequences(kv_gradient="stop"):
    """The documents do not see each other: by sdpa, a mask says so."""
    model, batch = family(), packed()
    run = train(model, batch, kv_gradient=kv_gradient)
    assert row_sparse(model).details["dense_attention"] == row_sparse(model).details["densified"] == {}
    document = (torch.arange(LENGTH)[:, None] >= torch.tensor(STARTS)).sum(1)
    mask = (document[:, None] == document) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    by_mask = {**models.make_batch(1), "position_ids": POSITIONS, "attention_mask": mask[None, None]}
    assert_same(run, train(family(attention="sdpa"), by_mask, kv_gradient=kv_gradient))


def test_context_ends_with_a_packed_sequence():
    """Positions go on: only cu_seqlens tells the documents apart; by sdpa, a mask."""
    batch = packed() | {"position_ids": torch.arange(LENGTH)[None]}
    batch["labels"] = torch.where(torch.isin(torch.arange(LENGTH), torch.tensor([3, 7, 14])), batch["input_ids"], -100)
    options = dict(selection="labels", max_selected=1.0, scoring="random", context=5)
    model = family()
    run = train(model, batch, **options)
    document = (torch.arange(LENGTH)[:, None] >= torch.tensor(STARTS)).sum(1)
    rows = context_rows(torch.tensor([[2, 6, 13]]), 5, LENGTH, LENGTH, documents=document[None])
    assert metrics(model)["gradient_tokens"] == 3 + int(rows.sum()) == 3 + 2 + 1 + 4
    mask = (document[:, None] == document) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    by_mask = {name: batch[name] for name in ("input_ids", "labels", "position_ids")} | {
        "attention_mask": mask[None, None]
    }
    assert_same(run, train(family(attention="sdpa"), by_mask, **options))


def test_ratio_one_is_the_model():
    model = family()
    assert_same(train(model, BATCH, min_tokens_ratio=1.0), dense(family(attention="sdpa"), BATCH))
    assert_same(train(family(), packed(), min_tokens_ratio=1.0), dense(family(), packed()))


@pytest.mark.slow
def test_soft_cap():
    config = dict(attn_logit_softcapping=2.0, final_logit_softcapping=None)
    model = family("gemma2", **config)
    run = train(model, BATCH)
    assert not row_sparse(model).details["dense_attention"]
    assert_same(run, train(family("gemma2", "eager", **config), BATCH))


@pytest.mark.slow
def test_checkpoints():
    runs = []
    for attention in ("flash_attention_2", "sdpa"):
        model = family(attention=attention)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        runs.append(train(model, BATCH))
    assert_same(*runs)


def test_where_transformers_breaks_the_graph():
    """Head and loss are in a piece of their own: every label is selected there, and the reason names the cause."""
    model, batch = family(), padded("right")
    with complaints() as heard:
        run = train(model, batch, fallback="warn", selection="labels", max_selected=1.0)
    assert metrics(model)["level"] == "loss"
    assert_same(run, dense(model, batch))
    assert "with flash_attention_2, transformers breaks the graph" in metrics(model)["fallback_reason"]
    assert any("leave out a mask that hides nothing" in message for message in heard)


def attention(q, k, v, **form):
    return flash_attn_stand_in.flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), **form).transpose(1, 2)


def test_the_stand_in_is_attention():
    """Causal from the last key on, in windows, with shared heads; its backward is its gradient."""
    q, k, v = (torch.randn(2, heads, length, 8, requires_grad=True) for heads, length in ((4, 5), (2, 7), (2, 7)))
    behind = torch.arange(7) - torch.arange(5)[:, None] - 2
    forms = [({"causal": True}, behind <= 0), ({"window_size": (1, 2)}, (behind >= -1) & (behind <= 2))]
    for form, mask in forms:
        got, want = attention(q, k, v, **form), F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(got, want)
        weight = torch.randn_like(got)
        for a, b in zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (got, want)), strict=True):
            torch.testing.assert_close(a, b)
