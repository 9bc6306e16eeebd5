"""Models of one class share Dynamo's graph; steps, metrics and schedules are each model's own."""

from __future__ import annotations

import pytest
import torch
from models import family

import cggr_compile

OPTIONS = {"compiler": "eager", "scoring": "random", "min_tokens_ratio": 0.5}


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()


def compiled(**options):
    model = family("llama").train()
    model.compile(backend="cggr", options=OPTIONS | options)
    return model


def train(model, ids, steps=1):
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()


def test_the_second_model_of_a_sweep_has_its_own_runtime():
    ids = torch.randint(0, 50, (2, 16))
    first, second = compiled(), compiled()
    train(first, ids, 3)
    with torch.compiler.set_stance("fail_on_recompile"):  # otherwise this test would show nothing
        train(second, ids, 2)
        train(first, ids)
    runtimes = [cggr_compile.runtime(model) for model in (first, second)]
    assert [runtime.metrics()["step"] for runtime in runtimes] == [4, 2]
    for runtime in runtimes:
        assert runtime.metrics()["matched"] and runtime.selected is not None and len(runtime.reports) == 1
    assert runtimes[0].options == runtimes[1].options


@pytest.mark.slow
def test_the_second_model_begins_its_curriculum_anew():
    ids = torch.randint(0, 50, (2, 16))
    first, second = compiled(warmup_steps=4), compiled(warmup_steps=4)
    train(first, ids, 6)
    train(second, ids)
    assert cggr_compile.runtime(first).metrics()["ratio"] == 0.5
    assert cggr_compile.runtime(second).metrics()["ratio"] == 1.0


def test_equal_selections_from_equal_steps():
    ids = torch.randint(0, 50, (2, 16))
    selected = []
    for _ in range(2):
        model = compiled()
        train(model, ids, 2)
        selected.append(cggr_compile.runtime(model).selected)
    assert torch.equal(*selected)
