"""Context: positions before what is trained on carry gradient, in whole models, against a loop over positions."""

from __future__ import annotations

from typing import Any

import models
import placed
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import FAMILIES, SEQ, PlainLM, compiled, make_batch
from reference import (
    Run,
    assert_same,
    backward,
    candidates,
    context_rows,
    dense,
    hard_mask,
    hf_reference,
    reference,
    shift,
    worst,
)
from torch import Tensor
from training import complaints, metrics, picks, small

import cggr_compile

CONTEXT, SLOTS = 3, 12
LABELS = {"selection": "labels", "max_selected": SLOTS, "scoring": "random", "context": CONTEXT}
KV = ("project", "stop")


def spans() -> dict[str, Tensor]:
    """Several spans, one at position 0, windows that overlap, and one that is cut short by the beginning."""
    batch = make_batch(ignored=False)
    where = torch.zeros(2, SEQ, dtype=torch.bool)
    where[0, [1, 2, 9, 10, 13]] = True
    where[1, [3, 6, 15]] = True
    return {**batch, "labels": batch["input_ids"].masked_fill(~where, -100)}


def context(model: Any, slots: int = SLOTS, reach: int = CONTEXT, size: int = SEQ, **kinds: Any) -> Tensor:
    return context_rows(picks(model).rows, reach, slots, size, **kinds)


def check(model: torch.nn.Module, batch: dict[str, Any], kv_gradient: str = "project", **kinds: Any) -> Run:
    got = backward(model, model(**batch).loss)
    assert metrics(model)["matched"] is True, metrics(model)
    chosen, more = picks(model), context(model, **kinds)
    assert metrics(model)["gradient_tokens"] == int((chosen.rows >= 0).sum() + more.sum())
    inputs = {name: value for name, value in batch.items() if not name.startswith(("cu_seq", "max_length"))}
    assert_same(got, hf_reference(model, inputs, chosen, kv_gradient=kv_gradient, context=more))
    return got


def families() -> list[Any]:
    quick = {("llama", "project"), ("gpt2", "project"), ("mixtral", "stop")}
    pairs = [(name, kv) for name in FAMILIES for kv in KV]
    return [pytest.param(*pair, marks=[] if pair in quick else [pytest.mark.slow]) for pair in pairs]


@pytest.mark.parametrize(("name", "kv_gradient"), families())
def test_families(name: str, kv_gradient: str) -> None:
    model, batch = small(name), spans()
    compiled(model, kv_gradient=kv_gradient, **LABELS)
    got = check(model, batch, kv_gradient)
    without = hf_reference(model, batch, picks(model), kv_gradient=kv_gradient)
    assert worst(got, without)[0] > 1e-3, "a check that cannot fail"
    assert metrics(model)["context_overflow"] == metrics(model)["labels_overflow"] == 0


@pytest.mark.parametrize("kv_gradient", KV)
def test_any_spans(kv_gradient: str) -> None:
    """Any labels, padding on either side, more labels or context than slots: what fits is nearest, the rest counted."""
    model, slots = small(num_hidden_layers=1), 7
    compiled(model, kv_gradient=kv_gradient, padding="any", **{**LABELS, "max_selected": slots})
    missed = [0, 0]

    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        batch, place = make_batch(ignored=False), torch.arange(SEQ)
        edge = st.integers(0, SEQ)
        where = torch.zeros(2, SEQ, dtype=torch.bool)
        real = torch.ones(2, SEQ, dtype=torch.bool)
        for row in range(2):
            for begin, length in data.draw(st.lists(st.tuples(edge, st.integers(1, 5)), max_size=4)):
                where[row, begin : begin + length] = True
            cut = data.draw(st.integers(0, 6))
            real[row] = place >= cut if data.draw(st.booleans()) else place < SEQ - cut
        labels = batch["input_ids"].masked_fill(~(where & real), -100)
        if not candidates(shift(labels)).any():
            return
        batch = {"input_ids": batch["input_ids"], "labels": labels, "attention_mask": real.long()}
        check(model, batch, kv_gradient, slots=slots, real=real)
        rows = picks(model).rows
        every = context_rows(rows, CONTEXT, SEQ, SEQ, real=real)
        missed[0] += int((candidates(shift(labels)).sum(1) - slots).clamp(0).sum())
        missed[1] += int((every & ~context_rows(rows, CONTEXT, slots, SEQ, real=real)).sum())
        assert [metrics(model)["labels_overflow"], metrics(model)["context_overflow"]] == missed

    run()
    assert all(missed), "examples without overflow"


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 4 + [2] * 7, [0] * 8 + [1] * 8])
POSITIONS = torch.stack([torch.cat([torch.arange(int(n)) for n in row.bincount() if n]) for row in DOCUMENTS])


def packed() -> dict[str, Tensor]:
    """Labels near the beginnings of documents: windows of three positions would cross them."""
    batch = make_batch(ignored=False)
    where = torch.zeros(2, SEQ, dtype=torch.bool)
    where[0, [6, 10, 11]] = True
    where[1, [3, 10]] = True
    return {"input_ids": batch["input_ids"], "labels": batch["input_ids"].masked_fill(~where, -100)}


@pytest.mark.parametrize("told_by", ["position_ids", "position_ids alone", "block mask"])
def test_windows_end_with_the_document(told_by: str) -> None:
    """Transformers makes a mask of ``position_ids``, unless it gets one: then they alone tell.

    Where attention does not cross either, rows of another document would have no gradient: their number tells.
    """
    model, batch = small(num_hidden_layers=1, use_cache=False), packed()
    if told_by.startswith("position_ids"):
        batch["position_ids"] = POSITIONS
    if told_by == "position_ids alone":
        batch["attention_mask"] = torch.ones(2, SEQ, dtype=torch.long)
    if told_by == "block mask":
        same = DOCUMENTS[:, :, None] == DOCUMENTS[:, None]
        batch["attention_mask"] = (same & torch.ones(SEQ, SEQ, dtype=torch.bool).tril())[:, None]
    compiled(model, **LABELS)
    got, across = check(model, batch, documents=DOCUMENTS), context(model)
    assert across.sum() > context(model, documents=DOCUMENTS).sum(), "a check that cannot fail"
    if told_by == "position_ids alone":
        assert worst(got, hf_reference(model, batch, picks(model), context=across))[0] > 1e-3
    reason = cggr_compile.runtime(model).reports[-1].record("select_rows").reason
    assert reason.startswith("labels, min(12, S) slots per sequence, context 3 inside of documents (")


@pytest.mark.parametrize("attend", [models.attend_sdpa, models.attend_softmax], ids=["sdpa", "by hand"])
def test_a_mask_of_data(attend: Any) -> None:
    """Token 1 begins a document: only the mask tells."""
    model, (ids, labels) = models.Decoder(attend, documents=True, fused=False, layers=1), packed().values()
    ids[:, 8] = 1

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), shift(labels).flatten())

    got = backward(model, compiled(step, **LABELS)(ids, labels))
    assert metrics(model)["matched"] is True
    more = context(model, documents=(ids == 1).cumsum(1))
    assert_same(got, reference(model, lambda: model(ids), shift(labels), picks(model), context=more))
    rows = (picks(model).rows >= 0).sum()
    assert metrics(model)["gradient_tokens"] == rows + more.sum() < rows + context(model).sum()


SELECTIONS: dict[str, tuple[dict[str, Any], int]] = {
    "importance": ({}, 8),
    "importance-weighed": ({"kv_weight": "1/sqrt(p)"}, 8),
    "random-weighed-stop": ({"selection": "random", "kv_weight": "1/sqrt(p)", "kv_gradient": "stop"}, 8),
    "topk": ({"selection": "topk", "max_selected": 6}, 6),
    "spans-weighed": ({"selection": "spans", "span": 3, "kv_weight": "1/sqrt(p)"}, 8),
    "batch": ({"scope": "batch", "max_selected": 7}, 7),
    "labels-weighed": ({"selection": "labels", "max_selected": 7, "kv_weight": "1/sqrt(p)"}, 7),
}


@pytest.mark.parametrize("name", models.slow_but(["importance-weighed", "batch", "labels-weighed"], SELECTIONS))
def test_context_of_any_selection(name: str) -> None:
    """As many slots as selected ones, or ``max_selected``; context is not drawn, so its factor at K and V is 1."""
    options, slots = SELECTIONS[name]
    model, batch = PlainLM(), make_batch()
    if name.startswith("labels"):
        batch["labels"][0] = -100  # without an overflow there the weights are 1
        batch["labels"][0, 9] = 3
    compiled(model, min_tokens_ratio=0.25, context=2, **options)
    got = backward(model, model(**batch).loss)
    chosen, more = picks(model), context(model, slots, 2)
    assert more.any() and (hard_mask(chosen.rows, SEQ) | more).sum(1).max() <= slots
    mode = {name: options[name] for name in ("kv_weight", "kv_gradient") if name in options}
    assert_same(got, hf_reference(model, batch, chosen, context=more, **mode))
    if "kv_weight" in mode:
        without = {**mode, "kv_weight": "1"}
        assert worst(got, hf_reference(model, batch, chosen, context=more, **without))[0] > 1e-3


OTHERS: dict[str, dict[str, Any]] = {
    "verify": {"verify": 1},
    "dense backward": {"row_sparse": False},
    "fused head": {"cross_entropy": "fused"},
    "checkpoints": {},
}


@pytest.mark.parametrize("name", models.slow_but(["verify", "fused head"], OTHERS))
def test_other_options(name: str) -> None:
    model, batch = PlainLM(), spans()
    if name == "checkpoints":
        model = small(num_hidden_layers=1, use_cache=False)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled(model, **LABELS, **OTHERS[name])
    check(model, batch)
    if name == "verify":
        assert metrics(model)["verify_steps"] == 1 and metrics(model)["verify_max_error"] < 1e-5


def test_autocast() -> None:
    """The rows are those of float32, and the gradients near enough."""
    model, batch = PlainLM(), spans()
    compiled(model, **LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    got = backward(model, loss)
    assert metrics(model)["gradient_tokens"] == int((picks(model).rows >= 0).sum() + context(model).sum())
    with torch.autocast("cpu", torch.bfloat16):
        near = hf_reference(model, batch, picks(model), context=context(model))
        far = hf_reference(model, batch, picks(model))
    assert worst(got, near)[0] < 0.1 < worst(got, far)[0]


def test_beside_trained_inputs() -> None:
    """A soft prompt's positions have slots of their own; where these are free, context may have them."""
    embed, shapes, image = placed.KNOWN["prefix"][:3]
    model, (ids, labels) = placed.Placed(embed, shapes, False), placed.batch(image)
    labels[:, :9], labels[0, 12] = -100, -100
    compiled(model, **{**LABELS, "max_selected": 10, "fallback": "warn"})
    got = backward(model, model(ids, labels))
    extra, more = placed.positions("prefix"), context(model, SEQ)
    assert metrics(model)["context_overflow"] == 0 and (more & ~extra).sum() == 3 + 4
    assert_same(
        got, reference(model, lambda: model.logits(ids), shift(labels), picks(model), extra=extra, context=more)
    )


def test_nothing_to_add() -> None:
    """The exact gradient has no use for context, and ratio 1.0 is the model."""
    for options in ({"selection": "labels", "max_selected": 1.0, "gradient": "exact"}, {"min_tokens_ratio": 1.0}):
        torch._dynamo.reset()
        model, batch = PlainLM(), spans()
        compiled(model, **options)
        assert_same(backward(model, model(**batch).loss), dense(model, batch))
        assert metrics(model)["gradient_tokens"] is None and metrics(model)["context_overflow"] is None


def test_gradient_auto_that_becomes_exact() -> None:
    embed, shapes, image = next(iter(placed.UNKNOWN.values()))[:3]
    model, (ids, labels) = placed.Placed(embed, shapes, True), placed.batch(image)
    compiled(model, **{**LABELS, "fallback": "warn"})
    with complaints():
        got = backward(model, model(ids, labels))
    record = cggr_compile.runtime(model).reports[-1].record("select_rows")
    assert "context" not in record.reason and "gradient_slots" not in record.details
    assert_same(got, reference(model, lambda: model.logits(ids), shift(labels), picks(model), gradient="exact"))


def test_the_default_is_context_of_labels() -> None:
    model, batch = PlainLM(), spans()
    compiled(model, selection="labels", max_selected=1.0)
    check(model, batch, slots=SEQ, reach=128)
    reason = cggr_compile.runtime(model).reports[-1].record("select_rows").reason
    assert reason == "labels, ceil(1 * S) slots per sequence, context 128"


def test_overflow_is_told_once() -> None:
    """With the option that helps, in the log; context alone only where no label was dropped."""
    model, batch = PlainLM(), spans()
    compiled(model, **{**LABELS, "max_selected": 6})
    with complaints() as said:
        for _ in range(4):
            model(**batch)
    (told,) = [text for text in said if "context_overflow" in text]
    assert "max_selected" in told and not any("labels_overflow" in text for text in said)
    with complaints() as said:
        for _ in range(4):
            model(**{**batch, "labels": batch["input_ids"]})
    (told,) = [text for text in said if "overflow" in text]
    assert "labels_overflow" in told and "max_selected" in told


def test_sizes_that_stay_symbolic() -> None:
    model = models.Decoder(layers=1)
    options = {"selection": "labels", "min_tokens_ratio": 0.5, "scoring": "random", "context": CONTEXT}
    run = compiled(lambda ids, labels: torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten()),
                   **options)  # fmt: skip
    for length in (16, 24, 8):
        ids = make_batch(2, length)["input_ids"]
        labels = torch.where(torch.arange(length) % 5 == 0, ids, -100)
        for tensor in (ids, labels):
            torch._dynamo.mark_dynamic(tensor, 1)
        got = backward(model, run(ids, labels))
        more = context(model, length // 2, size=length)
        assert more.any()
        assert_same(got, reference(model, lambda ids=ids: model(ids), labels, picks(model), context=more))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kv_gradient", KV)
def test_generated_code(kv_gradient: str) -> None:
    model, batch = small(num_hidden_layers=1, use_cache=False), packed()
    compiled(model, compiler="inductor", kv_gradient=kv_gradient, **LABELS)
    check(model, {**batch, "position_ids": POSITIONS}, kv_gradient, documents=DOCUMENTS)
