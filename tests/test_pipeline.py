"""Passes that raise (the user is told), what passes declare, and passes that are switched off."""

from __future__ import annotations

import models
import pytest
import torch
from reference import assert_same, backward, dense, hf_reference
from training import complaints, metrics, picks

import cggr_compile
from cggr_compile.causes import Cause
from cggr_compile.options import Options
from cggr_compile.passes.base import GraphContext, JointPass, PassResult, SemanticPass, UndeclaredFactError
from cggr_compile.passes.facts import NoRouter, Routing
from cggr_compile.passes.fx import Emitter
from cggr_compile.pipeline import PASSES, SWITCHED_OFF, check_order


def trained(model=None, **options):
    """A model after a step, what it computed, and what the user heard."""
    model, batch = models.compiled(model or models.PlainLM(), **options), models.make_batch()
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


def test_what_was_chosen_is_chosen_again_and_told_without_the_router(monkeypatch, caplog):
    def broken(emit, *args):
        raise KeyError("oops")

    monkeypatch.setattr("cggr_compile.passes.semantic.insert_router.difficulty", broken)
    model, *_ = trained()
    assert "selection='auto' is 'importance' here" in caplog.text
    report = cggr_compile.runtime(model).reports[0]
    assert report.record("choose_selection").matched and "have a label" in report.reason


def test_routing_that_fails_half_way(monkeypatch):
    """Not one layer routed and the next one not."""
    insert, calls = Emitter.call, []

    def broken(self, target, *args, **kwargs):
        if target is torch.ops.cggr.detach_unselected.default:
            calls.append(target)
            if len(calls) == 2:
                raise KeyError("oops")
        return insert(self, target, *args, **kwargs)

    monkeypatch.setattr(Emitter, "call", broken)
    check_dense("route_gradient", models.family("llama", num_hidden_layers=2))
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["functionalize.Functionalize", "group_queries.GroupQueries"])
def test_any_other_optional_pass(name, monkeypatch):
    def broken(self, gm, ctx):
        raise KeyError("oops")

    monkeypatch.setattr(f"cggr_compile.passes.semantic.{name}.__call__", broken)
    check_dense(name.partition(".")[0])


def check_dense(name, model=None):
    """The captured graph trains, and the warning names the pass and what it raised."""
    model, batch, run, heard = trained(model, fallback="warn")
    assert_same(run, dense(model, batch))
    (told,) = heard
    assert "internal error: KeyError: 'oops', in pass" in told and "please report" in told
    assert cggr_compile.runtime(model).reports[0].cause is Cause.INTERNAL_ERROR
    assert name in told and not metrics(model)["matched"]


# What passes declare.


class Given(SemanticPass):
    """Leaves a fact, or reads one."""

    name = "given"
    provides = (Routing,)


class Reader(SemanticPass):
    name = "reader"
    needs = (Routing,)

    def __call__(self, gm, ctx):
        return PassResult(True, ctx[Routing].gradient)


class Other(JointPass):
    name = "other"


def test_order_is_held_to_what_passes_declare():
    given, reader = Given(), Reader()
    check_order((given, reader, Other()))
    with pytest.raises(ValueError, match="reader reads Routing, which no earlier pass leaves"):
        check_order((reader, given))
    with pytest.raises(ValueError, match="two passes are named given"):
        check_order((given, Given()))
    with pytest.raises(ValueError, match="semantic passes come before joint ones"):
        check_order((Other(), given))
    given.optional = True
    with pytest.raises(ValueError, match="reader needs Routing, which an optional pass leaves"):
        check_order((given, reader))


def test_a_pass_gets_only_the_facts_that_it_declares():
    ctx = GraphContext(Options(), [], None)
    ctx.add(Routing("exact"))
    assert Reader()(None, ctx).reason == "exact" and ctx.get(NoRouter) is None
    ctx.running = Reader()
    assert ctx[Routing].gradient == "exact"
    with pytest.raises(UndeclaredFactError, match="reader does not say that it needs or uses NoRouter"):
        ctx.get(NoRouter)
    with pytest.raises(UndeclaredFactError, match="reader does not say that it provides Routing"):
        ctx.add(Routing("routed"))


# Passes that are switched off.

OPTIONAL = [p.name for p in PASSES if p.optional]


# in an ordinary decoder: without them the graph is another one
AT_WORK = ["row_sparse", "merge_sums", "shorten_last_block", "insert_router", "group_queries", "recover_causal_mask"]


@pytest.mark.parametrize("name", models.slow_but(AT_WORK, OPTIONAL))
def test_training_is_right_without_it(name):
    """Each optional pass by itself: the gradients stay right, and explain() says that it is off."""
    model, batch = (
        models.compiled(models.family("llama", num_hidden_layers=1), disable_passes=[name]),
        models.make_batch(),
    )
    run = backward(model, model(**batch).loss)
    assert_same(run, hf_reference(model, batch, picks(model)))
    report = cggr_compile.runtime(model).reports[0]
    assert report.matched and report.record(name).reason == SWITCHED_OFF and not report.record(name).matched


def test_what_becomes_of_experts_and_of_ranks_without_their_pass():
    """What a pass is there for is not done, and that is said."""
    with complaints() as heard:
        experts = models.compiled(
            models.family("mixtral", num_hidden_layers=1), disable_passes=["lower_experts"], fallback="warn"
        )
        experts(**models.make_batch()).loss.backward()
        ranked = models.compiled(models.PlainLM(), disable_passes=["insert_router"], selection="topk")
        ranked(**models.make_batch()).loss.backward()
    assert metrics(experts)["level"] == "routed"
    assert any("part of the backward still computes every position" in text for text in heard), heard
    assert any(f"becomes 'random': the router is left out: {SWITCHED_OFF}" in text for text in heard)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["find_loss"], "got 'find_loss': the graph is wrong without it"),
        (["merge_sum"], "got 'merge_sum': there is no such pass"),
        ("merge_sums", "must be a list of names"),
    ],
)
def test_passes_that_cannot_be_switched_off(names, message):
    model = models.compiled(models.PlainLM(), disable_passes=names)
    with pytest.raises(ValueError, match=message):
        model(**models.make_batch())
