"""The optimised graph against the semantic graph: the same loss, every gradient equal."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from row_sparse_comparison import LosesTheSign, compare

import cggr_compile
from cggr_compile.passes.joint.row_sparse import rules


def call_with(batch):
    return lambda model: model(**batch).loss


def small(name, layers=2, **changes):
    """One layer has every operator; two, rows that one passes on to the other."""
    names = {"gpt2": "n_layer", "gpt_bigcode": "n_layer", "codegen": "n_layer", "mpt": "n_layers"}
    count = names.get(name, "num_hidden_layers")
    return lambda: models.family(name, **{count: layers}, **changes)


FULLY_SPARSE = [
    *("llama", "qwen2", "qwen3", "gemma", "olmo2", "smollm3", "cohere", "granite", "mistral", "gemma3", "phi"),
    *("llama-eager", "gemma2-eager"),
    # one projection to queries, keys and values: side by side, by heads, by groups of heads
    *("gpt2", "gpt_neox", "phi3", "falcon", "falcon-groups", "falcon-heads", "gpt_bigcode", "mpt", "persimmon"),
    "codegen",
]


@pytest.mark.parametrize("kv_gradient", ["stop", "project"])
@pytest.mark.parametrize("family", FULLY_SPARSE)
def test_nothing_is_made_dense(family, kv_gradient):
    record = compare(small(family), call_with(models.make_batch()), kv_gradient=kv_gradient)
    assert record.details["densified"] == {} and not record.details["dense_attention"]


@pytest.mark.slow
def test_what_is_made_dense_is_counted(monkeypatch):
    monkeypatch.delitem(rules.RULES, torch.ops.aten.cat.default)
    record = compare(small("gpt_neox"), call_with(models.make_batch()))
    assert record.details["densified"] == {"aten.cat.default": 2}
    (places,) = record.details["densified_at"].values()
    assert len(places) == 2 and ".1.att" in places[0]


def test_exact_gradient():
    compare(small("llama"), call_with(models.make_batch()), gradient="exact")


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([4, 8, 16, 32]),  # heads, head size, and the hidden size among them
    st.sampled_from([0.01, 0.25, 0.6, 0.99]),
    st.sampled_from(["stop", "project"]),
)
def test_shapes_and_ratios(size, seq, ratio, kv_gradient):
    batch = models.make_batch(size, seq)
    compare(
        small("llama"),
        call_with(batch),
        min_tokens_ratio=ratio,
        kv_gradient=kv_gradient,
    )


def test_batch_equals_length_equals_width():
    batch = models.make_batch(models.HIDDEN, models.HIDDEN)

    def make():
        torch.manual_seed(0)
        return models.PlainLM()

    compare(make, call_with(batch), kv_gradient="stop")


@pytest.mark.parametrize("side", [pytest.param("left", marks=pytest.mark.slow), "right"])
@pytest.mark.parametrize("kv_gradient", [pytest.param("stop", marks=pytest.mark.slow), "project"])
def test_padding(side, kv_gradient):
    batch = models.make_batch(3, 16)
    batch["attention_mask"] = torch.ones(3, 16, dtype=torch.long)
    padded = slice(0, 7) if side == "left" else slice(9, 16)
    batch["attention_mask"][1, padded] = 0
    batch["labels"][1, padded] = -100
    batch["labels"][2, 2:] = -100  # fewer candidates than slots
    compare(small("llama", 1), call_with(batch), kv_gradient=kv_gradient, min_tokens_ratio=0.6)


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_dropout_draws_the_same_numbers(attention):
    """In the embedding, in the residual stream, and on the probabilities of attention written out or decomposed."""
    dropout = dict(attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3)
    record = compare(small("gpt2", 1, attn_implementation=attention, **dropout), call_with(models.make_batch()))
    assert not [name for name in (*record.added, *record.removed) if "rand" in name or "bernoulli" in name]
    assert record.details["densified"] == {}
    assert not record.details["dense_attention"]


def test_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)

    def make():
        torch.manual_seed(0)
        return models.randomise(peft.get_peft_model(small("llama", 1)(), config))

    record = compare(make, call_with(models.make_batch()))
    assert record.details["densified"] == {} and not record.details["dense_attention"]


@pytest.mark.slow
def test_autocast():
    def call(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**models.make_batch()).loss

    record = compare(small("llama", 1), call, tolerance=2e-2, kv_gradient="stop")
    assert record.details["densified"] == {} and not record.details["dense_attention"]


@pytest.mark.slow
def test_packed_sequences_in_a_sliding_window():
    batch = models.make_batch()
    batch["position_ids"] = torch.cat([torch.arange(6), torch.arange(10)])[None].expand(2, -1)
    record = compare(small("mistral", 1, sliding_window=4), call_with(batch), kv_gradient="stop")
    assert record.details["densified"] == {} and not record.details["dense_attention"]


def test_documents():
    batch = models.make_batch()

    def call(model):
        return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    def decoder(*args, **kwargs):
        torch.manual_seed(0)
        return models.Decoder(*args, **kwargs)

    compare(lambda: decoder(documents=True), call, kv_gradient="stop")


@pytest.mark.slow
def test_symbolic_sizes_stay_dense():
    batch = models.make_batch()
    for tensor in batch.values():
        torch._dynamo.mark_dynamic(tensor, 1)
    model = models.compiled(models.family("llama"))
    model(**batch).loss.backward()
    records = {p.name: p for p in cggr_compile.runtime(model).reports[-1].passes}
    assert not records["row_sparse"].matched and "symbolic" in records["row_sparse"].reason
    assert records["resolve_markers"].matched


def test_unknown_operators_are_made_dense_and_counted(monkeypatch):
    monkeypatch.delitem(rules.RULES, torch.ops.aten.neg.default)
    record = compare(small("llama", 1), call_with(models.make_batch()), kv_gradient="stop")
    assert record.details["densified"]["aten.neg.default"] > 0


def test_control_a_wrong_rule_fails(monkeypatch):
    """The comparison can fail: a rule that loses a factor is found out."""
    monkeypatch.setitem(rules.RULES, torch.ops.aten.neg.default, LosesTheSign())
    with pytest.raises(AssertionError, match="differ"):
        compare(small("llama", 1), call_with(models.make_batch()), kv_gradient="stop")
