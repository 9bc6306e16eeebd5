"""A pass that raises: the graph is as if it had not been there, and the user is told what that means."""

from __future__ import annotations

import models
import pytest
import torch
from reference import assert_same, backward, hf_reference
from training import complaints, metrics, picks

import cggr_compile
from cggr_compile.passes.fx import Emitter

SIZES = {"num_hidden_layers": 2}


def trained(**options):
    """A model after a step, what it computed, and what the user heard."""
    model, batch = models.compiled(models.family("llama", **SIZES), **options), models.make_batch()
    with complaints() as heard:
        run = backward(model, model(**batch).loss)
    return model, batch, run, [text for text in heard if "cggr: " in text and "oops" in text]


def test_a_router_that_fails_half_way(monkeypatch, caplog):
    """What it has inserted is gone, an autocast region that it had opened too."""

    def broken(emit, *args):
        emit._switch(torch.amp.autocast_mode._enter_autocast, "cpu", torch.bfloat16, True, None)
        raise KeyError("oops")

    monkeypatch.setattr("cggr_compile.passes.insert_router.difficulty", broken)
    model, batch, run, heard = trained(selection="topk")
    assert_same(run, hf_reference(model, batch, picks(model)))
    (told,) = heard
    assert "selection='topk' has nothing to rank by and becomes 'random'" in told
    assert "internal error: KeyError: 'oops'. This is a bug of cggr_compile" in told
    assert "Traceback" in caplog.text and "as it was captured" not in caplog.text
    report = cggr_compile.runtime(model).reports[0]
    assert [record.name for record in report.passes].count("insert_router") == 1
    assert "random, without a router" in report.record("select_rows").reason
    assert metrics(model)["matched"] and "KeyError" in report.record("insert_router").reason


def test_routing_that_fails_half_way(monkeypatch):
    """Not one layer routed and the next one not: the gradient is exact, and that is said."""
    insert, calls = Emitter.call, []

    def broken(self, target, *args, **kwargs):
        if target is torch.ops.cggr.stop_rows.default:
            calls.append(target)
            if len(calls) == 2:
                raise KeyError("oops")
        return insert(self, target, *args, **kwargs)

    monkeypatch.setattr(Emitter, "call", broken)
    model, batch, run, heard = trained()
    assert len(calls) == 2
    assert_same(run, hf_reference(model, batch, picks(model), gradient="exact"))
    assert any("as gradient='exact' has it: pass route_gradient failed" in text for text in heard)


@pytest.mark.parametrize("name", ["functionalize.Functionalize", "grouped_query.GroupQueries"])
def test_any_other_optional_pass(name, monkeypatch):
    def broken(self, gm, ctx):
        raise KeyError("oops")

    monkeypatch.setattr(f"cggr_compile.passes.{name}.__call__", broken)
    model, batch, run, heard = trained()
    assert_same(run, hf_reference(model, batch, picks(model)))
    assert any("the graph is rewritten without it" in text for text in heard)
