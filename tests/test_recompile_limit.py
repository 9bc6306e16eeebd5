"""Where Dynamo compiles a model no more, a warning says so, and the metrics say that they are of an earlier step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from models import compiled, make_batch
from test_causes import is_text_of
from training import complaints, metrics

import cggr_compile
from cggr_compile import recompile_limit
from cggr_compile.causes import Cause

LIMIT = 3


@pytest.fixture(autouse=True)
def low_limit():
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        yield


class Training:
    def __init__(self, fused=False, **options):
        torch.manual_seed(0)
        self.model = compiled(models.SlicedLoss(fused=False, layers=1), **{"fallback": "warn", **options})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=fused)

    def step(self, length=12, size=2):
        ids = make_batch(size, length)["input_ids"]
        self.model(ids, ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics(self.model)

    def generate(self, lengths):
        self.model.eval()
        try:
            with torch.no_grad():
                for length in lengths:
                    self.model(make_batch(1, length)["input_ids"])
        finally:
            self.model.train()


def limits(found):
    """The warnings that Dynamo has given up."""
    return [text for text in found if is_text_of(Cause.RECOMPILE_LIMIT, text)]


def test_training_after_generation_is_told():
    """Graphs for lengths of no interest fill the cache; a new size of batch then trains without the backend."""
    training = Training(fused=True)  # the Trainer's default; its steps leave no other trace
    runtime = cggr_compile.runtime(training.model)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        for _ in range(3):
            values = training.step()
        assert values["matched"] and values["stale_steps"] == 0
        with complaints() as heard:
            training.generate(range(5, 5 + LIMIT))
        (text,) = limits(heard)
        assert "torch._dynamo.config.recompile_limit (3)" in text and "'forward' (models.py:" in text
        assert runtime.metrics()["matched"] and runtime.metrics()["stale_steps"] == 0  # nothing has trained yet
        before = runtime.selected.clone()
        with complaints() as heard:
            for stale in range(1, 4):
                values = training.step(size=3)
                assert values["stale_steps"] == stale
            assert torch.equal(before, runtime.selected)
            assert not values["matched"] and is_text_of(Cause.RECOMPILE_LIMIT, values["fallback_reason"])
            values = training.step()  # the size that there is a graph for
            assert values["matched"] and values["stale_steps"] == 0 and values["fallback_reason"] is None
        assert not heard
    torch._dynamo.reset()
    training.step(size=3)
    assert metrics(training.model)["matched"] and metrics(training.model)["stale_steps"] == 0


def test_an_error_reaches_the_user():
    training = Training(fallback="error")
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        training.step()
        with pytest.raises(ValueError, match=r"fallback='error'.*recompile_limit \(3\)"):
            training.generate(range(5, 6 + LIMIT))
        with pytest.raises(ValueError, match="recompile_limit"):  # and again: nothing is dense in silence
            training.step(size=3)
        assert training.step()["matched"]


def test_silence_is_kept():
    training = Training(fallback="silent")
    with complaints() as heard, torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        training.step()
        training.generate(range(5, 6 + LIMIT))
    assert not limits(heard) and recompile_limit.given_up()


def test_many_models_of_one_class():
    """Shapes differ from model to model, so each takes a graph; the model that finds none left is told, by name."""

    def model(i):
        one = models.SlicedLoss(fused=False, layers=1)
        one.blocks[0].up, one.blocks[0].down = (
            torch.nn.Linear(models.HIDDEN, 8 + i),
            torch.nn.Linear(8 + i, models.HIDDEN),
        )
        return compiled(one, fallback="warn")

    ids = make_batch(2, 12)["input_ids"]
    with complaints() as heard:
        trained = [model(i) for i in range(LIMIT + 2)]
        for one in trained:
            one(ids, ids).backward()
    assert len(limits(heard)) == 1
    assert [metrics(one)["matched"] for one in trained] == [True] * LIMIT + [False] * 2
    # the first of the others was about to be compiled; Dynamo does not try with the next
    assert is_text_of(Cause.RECOMPILE_LIMIT, metrics(trained[LIMIT])["fallback_reason"])
    assert metrics(trained[-1])["fallback_reason"].startswith("nothing compiled yet; Dynamo has compiled 'forward'")
    torch._dynamo.reset()
    with complaints() as heard:
        trained[-1](ids, ids).backward()
    assert metrics(trained[-1])["matched"] and not limits(heard) and not recompile_limit.given_up()


@pytest.mark.slow
def test_sizes_that_change_often_do_not_reach_the_limit():
    """Before that, one graph with symbolic sizes serves the rest, and evaluation has its own."""
    training = Training()
    with complaints() as heard:
        for length in (8, 9, 10, 11, 12):
            values = training.step(length)
        training.generate([8, 9, 10])
        values = training.step(16)
    assert values["matched"] and values["stale_steps"] == 0
    assert not limits(heard) and not recompile_limit.given_up()


def test_code_of_others_is_none_of_our_business():
    training = Training()
    training.step()

    def other(x, n):
        return x * n

    run = torch.compile(other, backend="eager", dynamic=False)
    with complaints() as heard:
        for n in range(LIMIT + 2):
            run(torch.ones(n + 2), 2)
    assert not limits(heard) and not recompile_limit.given_up()


SCRIPT = """
import sys, warnings
import torch
import models
from cggr_compile import runtime
torch._dynamo.config.accumulated_recompile_limit = 2
warnings.simplefilter("always")
model = models.compiled(models.SlicedLoss(fused=False, layers=1), fallback="warn")
ids = models.make_batch()["input_ids"]
with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
    for length in (8, 9, 10, 11):
        model(ids[:, :length], ids[:, :length]).backward()
print(runtime(model).metrics())
"""


@pytest.mark.slow
def test_the_accumulated_limit_in_a_process_of_its_own():
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("FallbackWarning: cggr: Dynamo has compiled") == 1, run.stderr
    assert "torch._dynamo.config.accumulated_recompile_limit (2)" in run.stderr
