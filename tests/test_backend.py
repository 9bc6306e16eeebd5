from __future__ import annotations

import warnings

import models
import pytest
import torch
import torch.nn.functional as F
from reference import eager_call

import cggr_compile
from cggr_compile import compat
from cggr_compile.causes import Cause
from cggr_compile.runtime import FallbackWarning


def test_no_cpp_compiler_trains_all_the_same(monkeypatch):
    monkeypatch.setattr("cggr_compile.compat.cpp_compiler", lambda: None)
    model = models.compiled(models.PlainLM(), compiler="auto")
    model(**models.make_batch()).loss.backward()
    report = cggr_compile.runtime(model).reports[0]
    assert report.matched and report.compiler == "eager"


def test_mode_and_inductor_settings_are_checked():
    model = torch.compile(models.Decoder(layers=1), backend=models.backend(), mode="fastest")
    with pytest.raises(ValueError, match="mode must be one of"):
        model(models.make_batch()["input_ids"])
    torch._dynamo.reset()
    model = models.compiled(models.Decoder(layers=1), inductor={"max_autotunes": True})
    with pytest.raises(ValueError, match=r"unknown Inductor settings \['max_autotunes'\]"):
        model(models.make_batch()["input_ids"])


def broken(self, gm, ctx):
    """A pass that fails when it has written half of what it wants."""
    for node in gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
        node.replace_all_uses_with(node.args[2])
    raise KeyError("oops")


@pytest.mark.parametrize(
    ("name", "place"),
    [("rewrite_loss", "rewrite_loss.RewriteLoss"), ("group_queries", "group_queries.GroupQueries")],
)
def test_internal_error_falls_back_loudly(monkeypatch, caplog, name, place):
    """To the graph as it was captured, whether the rewriting depends on the pass or not."""
    monkeypatch.delenv("CGGR_STRICT")
    monkeypatch.setattr(f"cggr_compile.passes.semantic.{place}.__call__", broken)
    model, batch = models.compiled(models.PlainLM(), fallback="warn"), models.make_batch()
    with pytest.warns(
        FallbackWarning, match=f"{name}: internal error: KeyError: 'oops', in pass {name}: please report"
    ):
        loss = model(**batch).loss
    assert "Traceback" in caplog.text
    (report,) = cggr_compile.runtime(model).reports
    assert report.cause is Cause.INTERNAL_ERROR and not cggr_compile.runtime(model).metrics()["matched"]
    torch.testing.assert_close(loss, eager_call(model, **batch).loss)


@pytest.mark.parametrize("place", ["rewrite_loss.RewriteLoss", "group_queries.GroupQueries"])
def test_internal_errors_raise_where_they_are_looked_for(monkeypatch, place):
    monkeypatch.setattr(f"cggr_compile.passes.semantic.{place}.__call__", broken)
    model = models.compiled(models.PlainLM(), fallback="warn")
    with pytest.raises(Exception, match="oops"):
        model(**models.make_batch())


def test_a_broken_joint_pass_never_runs(monkeypatch):
    def broken_joint(self, graph):
        raise KeyError("oops")

    monkeypatch.delenv("CGGR_STRICT")
    monkeypatch.setattr("cggr_compile.passes.joint.resolve_markers.ResolveMarkers.__call__", broken_joint)
    model = models.compiled(models.PlainLM())
    with pytest.raises(Exception, match="oops"):
        model(**models.make_batch())


def test_optimizer_graphs_do_not_warn():
    @torch.no_grad()
    def update(p):
        p.mul_(0.9)

    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        models.compiled(update, fallback="warn")(torch.ones(3, requires_grad=True))


def test_reset():
    model, batch = models.compiled(models.PlainLM()), models.make_batch()
    model(**batch)
    torch._dynamo.reset()
    model(**batch)
    assert len(cggr_compile.runtime(model).reports) == 2


def test_frozen_base_with_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    model = peft.get_peft_model(models.family("llama", num_hidden_layers=1), config)
    models.compiled(model)(**models.make_batch()).loss.backward()
    assert cggr_compile.runtime(model).metrics()["matched"]
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained and all("lora" in n for n in trained)


def test_loss_in_half_precision_graph():
    decoder, batch = models.Decoder(layers=1).bfloat16(), models.make_batch()

    def step(ids, labels):
        return F.cross_entropy(decoder(ids).flatten(0, 1), labels.flatten())

    loss = models.compiled(step)(batch["input_ids"], batch["labels"])
    assert loss.dtype == torch.bfloat16
    loss.backward()


def test_a_graph_of_unknown_mode_stays_dense_loudly(monkeypatch):
    """Where the captured frame does not hold the model, evaluation must not be taken for training."""
    monkeypatch.setattr(compat, "module_at", lambda path, scopes: None)
    model, batch = models.PlainLM().eval(), models.make_batch()
    want = model(**batch)
    models.compiled(model, fallback="warn")
    with pytest.warns(FallbackWarning, match="trains or evaluates is unknown"):
        got = model(**batch)
    assert cggr_compile.runtime(model).reports[0].cause is Cause.UNKNOWN_MODE
    assert got.logits.shape == want.logits.shape
    torch.testing.assert_close(got.loss, want.loss)
