from __future__ import annotations

import gc
import weakref

import models
import pytest
import torch
from training import as_on_an_accelerator

import cggr_compile


def make(**options):
    model = models.compiled(models.PlainLM(), **options)
    return model, cggr_compile.runtime(model)


def test_same_runtime_however_the_model_is_wrapped():
    model = models.Decoder()
    wrapped = torch.compile(model, backend=models.backend())
    first = cggr_compile.runtime(model)
    assert cggr_compile.runtime(wrapped) is first
    assert cggr_compile.runtime(dict(model.named_parameters())) is first
    assert cggr_compile.runtime(list(model.parameters())) is first
    assert cggr_compile.runtime(models.Decoder()) is not first


@pytest.mark.parametrize("bad", [3, "model", torch.nn.ReLU(), {}, torch.ones(2)])
def test_runtime_of_something_else(bad):
    with pytest.raises(ValueError, match="model"):
        cggr_compile.runtime(bad)


def test_does_not_keep_the_model_alive():
    model = models.Decoder()
    cggr_compile.runtime(model)
    alive = weakref.ref(model.lm_head.weight)
    del model
    gc.collect()
    assert alive() is None


def test_metrics_keys_and_values():
    model, rt = make(scoring="entropy", selection="topk")
    before = rt.metrics()
    assert before["fallback_reason"] == "nothing compiled yet" and not before["matched"]
    batch = models.make_batch()
    model(**batch).loss.backward()
    values = rt.metrics()
    assert list(values) == [
        *("step", "ratio", "token_ratio", "tokens_selected", "tokens_total", "avg_confidence", "avg_entropy"),
        *("avg_difficulty", "gradient_tokens", "scoring", "selection", "labels_overflow", "context_overflow"),
        *("matched", "level", "fallback_reason", "verify_steps", "verify_max_error", "verify_worst", "added_variance"),
        "score_correlation",
        "concentration",
        "stale_steps",
    ]
    candidates = int((batch["labels"][:, 1:] != -100).sum())
    assert values["tokens_total"] == candidates and values["tokens_selected"] == values["gradient_tokens"] == 8
    assert values["token_ratio"] == pytest.approx(8 / candidates)
    assert 0 < values["avg_confidence"] < 1 and 0 < values["avg_entropy"] < 5
    assert values["avg_difficulty"] == pytest.approx(values["avg_entropy"] - values["avg_confidence"], abs=1e-4)
    assert values["matched"] and values["fallback_reason"] is None and values["step"] == 1
    assert values["level"] == "routed" and before["level"] is None
    assert values["ratio"] == 0.25 and before["ratio"] is None
    assert values["verify_steps"] == 0 and values["verify_max_error"] is None is values["verify_worst"]


def test_no_router_no_averages():
    model, rt = make(scoring="random")
    model(**models.make_batch())
    values = rt.metrics()
    assert values["avg_entropy"] is None and values["tokens_selected"] == 8


@pytest.mark.parametrize(
    "selection",
    models.slow_but(
        ["importance", "labels", "sequence_aware"], ["topk", "importance", "stratified", "labels", "sequence_aware"]
    ),
)
def test_reading_metrics_is_the_only_transfer(selection, monkeypatch):
    """A step converts no tensor to a Python number (on an accelerator each one would wait for the device)."""
    model, rt = make(selection=selection, scoring="loss")
    batch = models.make_batch()
    model(**batch).loss.backward()
    as_on_an_accelerator(monkeypatch)
    torch._dynamo.reset()
    model(**batch).loss.backward()
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name, **k: pytest.fail(f"Tensor.{name} in a step"))
    model(**batch).loss.backward()
    rt.step()


def test_manual_advance():
    model, rt = make(advance="manual")
    batch = models.make_batch()
    model(**batch)
    first = rt.selected.clone()
    model(**batch)
    assert torch.equal(first, rt.selected) and rt.metrics()["step"] == 0
    rt.step()
    model(**batch)
    assert not torch.equal(first, rt.selected) and rt.metrics()["step"] == 1


def test_resume():
    model, rt = make(seed=5)
    batch = models.make_batch()
    for _ in range(3):
        model(**batch)
    saved = rt.state_dict()
    model(**batch)
    expected = rt.selected.clone()
    other, fresh = make(seed=1)
    fresh.load_state_dict(saved)
    other(**batch)
    assert torch.equal(fresh.selected, expected) and fresh.metrics()["step"] == 4


def test_resumes_from_a_state_without_a_schedule():
    rt = cggr_compile.runtime(models.Decoder())
    rt.load_state_dict({"version": 1, "step": 7, "seed": 3})
    assert (rt.metrics()["step"], rt.seed) == (7, 3) and rt.state_dict()["version"] == 4


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"version": 1, "step": -1, "seed": 0},
        {"version": 9, "step": 0, "seed": 0},
        3,
        {"version": 2, "step": 0, "seed": 0},
    ],
)
def test_bad_state(state):
    with pytest.raises(ValueError, match="state"):
        cggr_compile.runtime(models.Decoder()).load_state_dict(state)
