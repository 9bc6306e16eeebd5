"""What of a call counts, by its kind (``test_recompute.py`` has those that repeat an earlier one)."""

from __future__ import annotations

import models
import torch

import cggr_compile
from cggr_compile.call import Call, ObservedCall


def test_an_observed_call_leaves_everything_as_it_was():
    model, batch = models.compiled(models.PlainLM(), ladder=[0.5], dynamic_threshold=True), models.make_batch()
    rt = cggr_compile.runtime(model)
    model(**batch)
    before, selected, weights = (rt.state_dict(), rt.metrics()), rt.selected, rt.weights
    assert before[0]["schedule"]["target"] is None, "the next step's ratio is not decided yet"
    with rt.observed() as seen:
        model(**batch)
    (report,) = seen
    assert report.matched and (rt.state_dict(), rt.metrics()) == before
    assert rt.selected is selected and rt.weights is weights
    model(**batch)
    assert rt.metrics()["step"] == before[1]["step"] + 1 and not torch.equal(rt.selected, selected)
    ObservedCall(rt).verified(1.0, "w")
    assert rt.metrics()["verify_steps"] == 0
    Call(rt).verified(1.0, "w")
    assert rt.metrics()["verify_steps"] == 1
