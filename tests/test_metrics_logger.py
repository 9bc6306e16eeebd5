"""``MetricsLogger``: which figures, how often, to whom."""

from __future__ import annotations

import json

import models
import pytest
import torch

import cggr_compile
from cggr_compile import MetricsLogger


def test_every_second_step_of_a_model(tmp_path):
    model = models.compiled(models.PlainLM())
    given, path = [], tmp_path / "new" / "metrics.jsonl"
    loggers = [MetricsLogger(model, sink, every=2) for sink in (given.append, path)]
    losses = []
    for _ in range(4):
        losses.append(model(**models.make_batch()).loss)
        for log in loggers:
            log(loss=losses[-1].detach())
    assert [values["cggr/step"] for values in given] == [2, 4]
    metrics = cggr_compile.runtime(model).metrics()
    last = given[-1]
    assert last["loss"] == losses[-1].item()
    assert last["cggr/ratio"] == 0.25 and last["cggr/level"] == "routed"
    assert last["cggr/avg_entropy"] == metrics["avg_entropy"] and "cggr/fallback_reason" not in last
    assert "cggr/added_variance" not in last  # None at this step
    assert [json.loads(line) for line in path.read_text().splitlines()] == given


def test_numbers_only():
    given = []
    metrics = {"level": "loss", "matched": True, "scoring": "combined", "ratio": 0.5, "added_variance": None}
    log = MetricsLogger(lambda: metrics, given.append, figures=metrics, prefix="x.", numbers=True)
    log.log(tokens=torch.tensor(3))
    assert given == [{"x.level": 1.0, "x.matched": 1.0, "x.ratio": 0.5, "tokens": 3.0}]


def test_before_the_first_step():
    given = []
    MetricsLogger(cggr_compile.Runtime(), given.append)()
    assert given[0]["cggr/step"] == 0 and "cggr/ratio" not in given[0]


@pytest.mark.parametrize(("arguments", "message"), [({"every": 0}, "every"), ({"figures": ["speed"]}, "figures")])
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=f"{message} must be"):
        MetricsLogger(cggr_compile.Runtime(), print, **arguments)
