"""A pass that raises: a router is left out, any other leaves the graph as captured, and the user is told."""

from __future__ import annotations

import models
import pytest
import torch
from reference import assert_same, backward, dense, hf_reference
from training import complaints, metrics, picks

import cggr_compile
from cggr_compile.causes import Cause
from cggr_compile.passes.fx import Emitter

SIZES = {"num_hidden_layers": 2}


def trained(**options):
    """A model after a step, what it computed, and what the user heard."""
    model, batch = models.compiled(models.family("llama", **SIZES), **options), models.make_batch()
    with complaints() as heard:
        run = backward(model, model(**batch).loss)
    return model, batch, run, [text for text in heard if "cggr: " in text and "oops" in text]


@pytest.fixture(autouse=True)
def as_for_users(monkeypatch):
    monkeypatch.delenv("CGGR_STRICT", raising=False)


def test_a_router_that_fails_half_way(monkeypatch, caplog):
    """What it has inserted is gone, an autocast region that it had opened too."""

    def broken(emit, *args):
        emit._switch(torch.amp.autocast_mode._enter_autocast, "cpu", torch.bfloat16, True, None)
        raise KeyError("oops")

    monkeypatch.setattr("cggr_compile.passes.semantic.insert_router.difficulty", broken)
    model, batch, run, heard = trained(selection="topk")
    assert_same(run, hf_reference(model, batch, picks(model)))
    (told,) = heard
    assert "selection='topk' has nothing to rank by and becomes 'random'" in told
    assert "internal error: KeyError: 'oops', in pass insert_router: please report" in told
    assert "Traceback" in caplog.text and "as it was captured" not in caplog.text
    report = cggr_compile.runtime(model).reports[0]
    assert [record.name for record in report.passes].count("insert_router") == 1
    assert "random, without a router" in report.record("select_rows").reason
    assert metrics(model)["matched"] and "KeyError" in report.record("insert_router").reason


def test_routing_that_fails_half_way(monkeypatch):
    """Not one layer routed and the next one not."""
    insert, calls = Emitter.call, []

    def broken(self, target, *args, **kwargs):
        if target is torch.ops.cggr.stop_rows.default:
            calls.append(target)
            if len(calls) == 2:
                raise KeyError("oops")
        return insert(self, target, *args, **kwargs)

    monkeypatch.setattr(Emitter, "call", broken)
    check_dense("route_gradient")
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["functionalize.Functionalize", "group_queries.GroupQueries"])
def test_any_other_optional_pass(name, monkeypatch):
    def broken(self, gm, ctx):
        raise KeyError("oops")

    monkeypatch.setattr(f"cggr_compile.passes.semantic.{name}.__call__", broken)
    check_dense(name.partition(".")[0])


def check_dense(name):
    """The captured graph trains, and the warning names the pass and what it raised."""
    model, batch, run, heard = trained(fallback="warn")
    assert_same(run, dense(model, batch))
    (told,) = heard
    assert "internal error: KeyError: 'oops', in pass" in told and "please report" in told
    assert cggr_compile.runtime(model).reports[0].cause is Cause.INTERNAL_ERROR
    assert name in told and not metrics(model)["matched"]
