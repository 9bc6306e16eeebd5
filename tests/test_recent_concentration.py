from __future__ import annotations

import copy
import json
import logging

import models
import pytest
import torch
from training import metrics

import cggr_compile
from cggr_compile.gradient_concentration import concentration, token_gradients
from cggr_compile.ops.gradient_moments import gradient_moments_reference
from cggr_compile.recent_concentration import RecentConcentration

BATCH = models.make_batch(4)
ALL = {"selection": "labels", "min_tokens_ratio": 0.999, "scoring": "random"}
# goes down after the second step, and says nothing
AUTO = {"min_tokens_ratio": "auto", "ladder": (0.999,), "variance_bound": 1e9, "measure_every": 100}
HALF = {**AUTO, "ladder": (0.5,), "scoring": "random"}


SCHEDULE_OF_VERSION_3 = {"target", "confidence", "level", "added", "measured_at", "figures", "variance"}


def half_known(model):
    """A batch of which the model, which gets sure of itself, knows half of the tokens, some without a gradient left."""
    with torch.no_grad():
        model.lm_head.weight.mul_(12.0)
        known = models.Decoder.forward(model, BATCH["input_ids"])[:, :-1:2].argmax(-1)
    labels = BATCH["labels"].clone()
    labels[:, 1::2] = known[:, : labels[:, 1::2].shape[1]]
    return {**BATCH, "labels": labels}


def expected_of(model, batch):
    gradients, labelled = token_gradients(copy.deepcopy(model), batch)[:, :-1], batch["labels"][:, 1:] != models.IGNORE
    assert bool((gradients[labelled] == 0).any())
    return concentration(gradients, labelled)


@pytest.mark.parametrize(
    "options",
    [
        AUTO,
        pytest.param({"cross_entropy": "fused", **AUTO}, marks=pytest.mark.slow),
        {"scoring": "learned"},
        pytest.param({"cross_entropy": "fused", "compiler": "inductor", **AUTO}, marks=pytest.mark.slow),
        pytest.param({"scoring": "learned", **AUTO}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_is_that_of_the_batch_where_every_row_is_selected(options):
    model = models.PlainLM()
    batch = half_known(model)
    expected = expected_of(model, batch)
    models.compiled(model, **{**ALL, **options})
    assert metrics(model)["concentration"] is None
    if "measure_every" in options:  # a step that is not measured, and not counted
        model(**models.make_batch(4, seed=1)).loss.backward()
    for _ in range(3):
        model(**batch).loss.backward()
    assert metrics(model)["ratio"] == 0.999
    assert metrics(model)["concentration"] == pytest.approx(expected, rel=1e-4) and expected < 0.8


@pytest.mark.parametrize("options", [{"scoring": "learned"}, pytest.param(HALF, marks=pytest.mark.slow)], ids=str)
def test_sampling_has_no_bias(options):
    model = models.PlainLM()
    batch = half_known(model)
    expected = expected_of(model, batch)
    models.compiled(model, **{"min_tokens_ratio": 0.5, "selection": "importance", **options})
    model(**models.make_batch(4, seed=1)).loss.backward()
    for _ in range(80):
        model(**batch).loss.backward()
    assert metrics(model)["ratio"] == 0.5
    assert metrics(model)["concentration"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("options", [{"selection": "topk", "scoring": "learned"}, {"scoring": "random"}], ids=str)
def test_unknown_without_p_or_gradients(options):
    model = models.compiled(models.PlainLM(), **options)
    model(**BATCH).loss.backward()
    assert metrics(model)["concentration"] is None


def test_resumes():
    model = models.compiled(models.PlainLM(), **HALF)
    for seed in range(3):
        model(**models.make_batch(4, seed=seed)).loss.backward()
    state = json.loads(json.dumps(cggr_compile.runtime(model).state_dict()))
    other = cggr_compile.runtime(models.PlainLM())
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert other.metrics()["concentration"] == metrics(model)["concentration"] is not None
    with pytest.raises(ValueError, match="concentration"):
        other.load_state_dict({**state, "concentration": [1.0]})
    schedule = {key: value for key, value in state["schedule"].items() if key in SCHEDULE_OF_VERSION_3}
    old = {**state, "version": 3, "schedule": schedule}
    del old["concentration"]
    other.load_state_dict(old)
    assert other.metrics()["concentration"] is None and other.state_dict()["schedule"]["level"] == 0.5


def moments(norms, p=1.0):
    """Of tokens of which every one is drawn, with the weights of a probability."""
    norms = torch.tensor([norms])
    return gradient_moments_reference(norms, torch.full_like(norms, 1 / p))


def test_steps_count_alike_and_decay():
    recent = RecentConcentration()
    recent.add(moments([1.0, 1.0]), 0.25)
    recent.add(moments([0.0, 1.0] * 50), 0.25)
    assert recent.value() == pytest.approx((0.95 + 0.5) ** 2 / (1.95 * (0.95 + 0.5)))
    recent.add(torch.zeros(5), 0.25)  # a batch without labels
    assert recent.value() == pytest.approx((0.95 + 0.5) ** 2 / (1.95 * (0.95 + 0.5)))
    for _ in range(300):
        recent.add(moments([0.0, 1.0]), 0.25)
    assert recent.value() == pytest.approx(0.5)


def test_auto_says_so_once(caplog):
    options = {**AUTO, "ladder": (0.1,), "measure_every": 1, "scoring": "random"}
    model = models.compiled(models.PlainLM(), **options)
    with caplog.at_level(logging.WARNING, "cggr_compile"):
        for seed in range(6):
            model(**models.make_batch(4, seed=seed)).loss.backward()
    said = [each.getMessage() for each in caplog.records if "squared error" in each.getMessage()]
    assert len(said) == 1 and "at ratio 0.1" in said[0] and "min_tokens_ratio=1.0" in said[0]
