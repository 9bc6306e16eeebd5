"""FlexAttention in whole models: the training that scaled_dot_product_attention gives the same model."""

from __future__ import annotations

import functools
import warnings

import models
import pytest
import torch
import torch.nn.attention.flex_attention as flex
from reference import assert_same, backward, context_rows, dense

import cggr_compile
from cggr_compile.runtime import FallbackWarning


@pytest.fixture(autouse=True)
def flexible(monkeypatch):
    """FlexAttention has no backward on the CPU, says its front door; behind that there is one."""
    monkeypatch.setattr(flex, "_validate_device", lambda query, key, value: None)


def family(attention, name="llama", layers=1, **config):
    return models.family(name, attn_implementation=attention, num_hidden_layers=layers, use_cache=False, **config)


def make(attention, **options):
    torch._dynamo.reset()
    return models.compiled(family(attention), **options)


def train(model, **batch):
    return backward(model, model(**batch).loss)


def row_sparse(model):
    (record,) = (p for p in cggr_compile.runtime(model).reports[-1].passes if p.name == "row_sparse")
    return record


BATCH = models.make_batch()
LENGTH = BATCH["input_ids"].shape[1]
POSITIONS = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).expand(2, -1)  # two documents in each sequence
DOCUMENTS = torch.arange(LENGTH) >= 5


def within_documents(batch, head, query, key):
    return (key <= query) & (DOCUMENTS[query] == DOCUMENTS[key])


def block_mask():
    return flex.create_block_mask(within_documents, 2, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=4)


@functools.cache
def stopped():
    return train(make("sdpa", kv_gradient="stop"), **BATCH, position_ids=POSITIONS)


def test_block_mask():
    model = make("flex_attention", kv_gradient="stop")
    run = train(model, **BATCH, position_ids=POSITIONS, attention_mask=block_mask())
    assert_same(run, stopped())
    assert row_sparse(model).details["dense_attention"] == {}


@pytest.mark.parametrize("block_size", [4, pytest.param(128, marks=pytest.mark.slow)])
def test_context_ends_with_a_document_of_the_block_mask(block_size):
    """The mask alone tells documents apart: blocks that it lists as full, as partial and not at all, or one block."""
    labels = torch.where(torch.isin(torch.arange(LENGTH), torch.tensor([3, 7, 14])), BATCH["input_ids"], -100)
    batch = dict(input_ids=BATCH["input_ids"], labels=labels, position_ids=torch.arange(LENGTH).expand(2, -1))
    mask = flex.create_block_mask(
        within_documents, 2, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=block_size
    )  # fmt: skip
    options = dict(selection="labels", max_selected=1.0, scoring="random", context=5)
    model = make("flex_attention", **options)
    run = train(model, **batch, attention_mask=mask)
    # 2, 6 and 13 predict the labels; 5 begins a document
    rows = context_rows(torch.tensor([[2, 6, 13]] * 2), 5, LENGTH, LENGTH, documents=DOCUMENTS[None].int())
    assert cggr_compile.runtime(model).metrics()["gradient_tokens"] == 2 * 3 + int(rows.sum()) == 2 * (3 + 8)
    numbers = torch.arange(LENGTH)
    dense_mask = within_documents(0, 0, numbers[:, None], numbers)[None, None].expand(2, -1, -1, -1)
    assert_same(run, train(make("sdpa", **options), **batch, attention_mask=dense_mask))


@pytest.mark.slow
def test_masks_made_by_transformers():
    """They are built under vmap, inside the graph: sliding windows of five keys, then for other lengths as well."""
    if not hasattr(torch._dynamo.config, "ignore_logging_functions"):
        pytest.skip("nothing keeps the warning of create_block_mask from breaking the graph")
    runs = []
    with torch._dynamo.config.patch(ignore_logging_functions={warnings.warn}):
        for attention in ("sdpa", "flex_attention"):
            torch._dynamo.reset()
            model = models.compiled(family(attention, "mistral", layers=1, sliding_window=5))
            runs.append([train(model, **models.make_batch(2, length)) for length in (12, LENGTH)])
    for expected, run in zip(*runs, strict=True):
        assert_same(run, expected)
    assert row_sparse(model).details["dense_attention"] == {}


def test_dense_attention_is_named(monkeypatch):
    """As where the row form was never checked: all but attention is on rows, and what is computed stays the same."""
    monkeypatch.setattr("cggr_compile.passes.patterns.attention.flex.DEVICES", ())
    with pytest.warns(FallbackWarning, match="attention in 1 layers: FlexAttention on cpu"):
        model = make("flex_attention", fallback="warn", kv_gradient="stop")
        run = train(model, **BATCH, position_ids=POSITIONS, attention_mask=block_mask())
    assert_same(run, stopped())
    record = row_sparse(model)
    assert record.details["densified"] == {} and "1 × FlexAttention on cpu" in record.reason


def test_exact_gradient():
    model = make("flex_attention", gradient="exact")
    run = train(model, **BATCH, position_ids=POSITIONS, attention_mask=block_mask())
    assert_same(run, train(make("sdpa", gradient="exact"), **BATCH, position_ids=POSITIONS))
    assert row_sparse(model).details["dense_attention"] == {}


def test_dense_training_and_evaluation_are_the_model():
    inputs = dict(position_ids=POSITIONS, attention_mask=block_mask(), **BATCH)
    model = make("flex_attention", min_tokens_ratio=1.0)
    expected = dense(family("sdpa"), BATCH | {"position_ids": POSITIONS})
    assert_same(train(model, **inputs), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).loss, expected.loss)
    assert not cggr_compile.runtime(model).reports[-1].matched
