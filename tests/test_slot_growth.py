"""Slots that the first batch has measured grow where later batches have more, and the gradients stay right."""

from __future__ import annotations

import models
import pytest
import torch
from models import SEQ
from reference import assert_same, backward, context_rows, hf_reference
from training import metrics, picks

import cggr_compile
from cggr_compile.slot_growth import STEPS, SlotGrowth


def figures(selected=10, total=10, rows=20, dropped=0):
    return torch.tensor([selected, total, *[float("nan")] * 3, rows, 0, dropped])


def steps(growth, stats, most=2, number=STEPS + 2):
    return [text for _ in range(number) if (text := growth.add(stats, most))]


def test_nothing_is_lost():
    growth = SlotGrowth()
    assert not steps(growth, figures(), number=50) and growth.level == 0
    assert not steps(growth, figures(selected=1990, total=2000, rows=4000), number=50)  # half a percent
    assert not steps(growth, figures(dropped=1), number=50)


@pytest.mark.parametrize(
    ("stats", "said"),
    [
        (figures(selected=8), "20.0% of the labels found no slot"),
        (figures(dropped=5), "33% of the context found no slot"),
    ],
)
def test_much_is_lost(stats, said):
    growth = SlotGrowth()
    (text,) = steps(growth, stats)
    assert text.startswith(said) and growth.level == 1
    steps(growth, stats)
    assert growth.level == 2
    assert not steps(growth, stats, number=30) and growth.level == 2


def test_without_rows_that_carry_no_loss():
    """No context, or the exact gradient: the graph returns five figures."""
    growth = SlotGrowth()
    assert not steps(growth, figures()[:5], number=50)
    (text,) = steps(SlotGrowth(), figures(selected=8)[:5])
    assert text.startswith("20.0% of the labels found no slot")


@pytest.mark.parametrize("options", [{"context": 0}, {"gradient": "exact"}], ids=str)
def test_a_model_without_context_grows(monkeypatch, options):
    monkeypatch.setattr("cggr_compile.slot_growth.STEPS", 2)
    model = models.compiled(models.PlainLM(), **options)
    for seed in range(6):
        model(**batch(3 if seed < 2 else 12, seed)).loss.backward()
    assert picks(model).rows.shape[1] > 3


def test_one_batch_decides_nothing():
    growth = SlotGrowth()
    assert not steps(growth, figures(selected=1), number=STEPS)


def batch(labels, seed):
    ids = models.make_batch(seed=seed, ignored=False)["input_ids"]
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(SEQ) < SEQ - labels, -100)}


def test_a_model_grows_with_its_batches(monkeypatch):
    """Three labels, then twelve: drawn at random while the slots are three, all of them when they have grown."""
    monkeypatch.setattr("cggr_compile.slot_growth.STEPS", 2)
    model = models.compiled(models.PlainLM(), context=1)
    slots = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(10):
            data = batch(3 if seed < 2 else 12, seed)
            run = backward(model, model(**data).loss)
            chosen = picks(model)
            slots.append(chosen.rows.shape[1])
            more = context_rows(chosen.rows, 1, min(4 * slots[-1] // 3, SEQ), SEQ)
            assert_same(run, hf_reference(model, data, chosen, context=more))
            model.zero_grad()
    assert sorted(set(slots)) == [3, 6, 12] and slots == sorted(slots)
    reports = cggr_compile.runtime(model).reports
    assert [report.waiting for report in reports] == [False, False, False]
    assert metrics(model)["selection"] == "labels" and metrics(model)["labels_overflow"] > 0


def test_a_recomputed_forward_keeps_its_slots():
    """The slots double between a forward and its repetition in the backward pass."""
    model = models.compiled(models.PlainLM(), context=1)
    model(**batch(3, 0)).loss.backward()
    data = batch(8, 1)
    loss = torch.utils.checkpoint.checkpoint(lambda **kwargs: model(**kwargs).loss, **data, use_reentrant=False)
    cggr_compile.runtime(model)._growth.level = 1
    chosen = picks(model)
    model.zero_grad()
    loss.backward()
    assert chosen.rows.shape[1] == 3
    model(**data).loss.backward()
    assert picks(model).rows.shape[1] == 6
