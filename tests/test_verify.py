"""``verify``: comparing the row-sparse with the dense backward on the user's own batches, without a trace."""

from __future__ import annotations

import logging

import models
import pytest
import torch
import torch.nn.functional as F
from reference import assert_same, backward
from torch import Tensor, nn

import cggr_compile
from cggr_compile.passes.joint.row_sparse import rules
from cggr_compile.passes.joint.row_sparse.plan import At, Call

SIZES = {"num_hidden_layers": 1}


def verified(model, batch=None, steps=1, **options):
    """The runtime after some training steps with ``verify=True``."""
    models.compiled(model, **{"verify": True, **options})
    for _ in range(steps):
        model(**(batch or models.make_batch())).loss.backward()
    return cggr_compile.runtime(model)


def break_a_rule(monkeypatch, factor):
    class Scaled(rules.Rule):
        def carry(self, at, node):
            layout, mul = at.layouts[node.args[0]], torch.ops.aten.mul.Scalar
            return Call((At(node.args[0], layout),), layout, make=lambda rv, rows: rv.emit.call(mul, rows, -factor))

    monkeypatch.setitem(rules.RULES, torch.ops.aten.neg.default, Scaled())


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_says_how_close(compiler):
    model = models.PlainLM()
    rt = verified(model, steps=2, compiler=compiler, scoring="random")
    values = rt.metrics()
    assert values["verify_steps"] == 2 and 0 < values["verify_max_error"] < 1e-5
    assert values["verify_worst"] in dict(model.named_parameters())
    (report,) = rt.reports
    assert report.verification.steps == 2 and report.verification.tolerance == 1e-5
    assert "verified: 2 steps, largest error" in str(cggr_compile.Explanation(rt.reports))


@pytest.mark.parametrize("factor", [1.0, 1.0 + 1e-3])
def test_control_a_wrong_rule_is_caught(monkeypatch, factor):
    """A rule that is off by a thousandth raises at the forward call; a right one, put in the same way, does not."""
    break_a_rule(monkeypatch, factor)
    model = models.family("llama", **SIZES)
    if factor == 1.0:
        verified(model, kv_gradient="stop")
        return
    with pytest.raises(cggr_compile.VerificationError, match=r"differ in model\.layers\.\d.*tolerance 1\.0e-05"):
        verified(model, verify=1, kv_gradient="stop")
    rt = cggr_compile.runtime(model)
    assert rt.metrics()["step"] == 0 and rt.metrics()["verify_max_error"] > 1e-5
    assert all(p.grad is None for p in model.parameters())
    model(**models.make_batch())  # the one step that was to be compared is over
    assert rt.metrics()["step"] == 1 and rt.metrics()["verify_steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.float16, "autocast"])
def test_coarse_arithmetic(monkeypatch, kind):
    """Rounding passes, though a tensor's relative error may be 3 %; a factor of 2 in one operator does not."""

    def run():
        model = models.family("qwen2", **SIZES)
        if kind != "autocast":
            return verified(model.to(kind), models.make_batch(4, 32), kv_gradient="stop")
        with torch.autocast("cpu", torch.bfloat16):
            return verified(model, models.make_batch(4, 32), kv_gradient="stop")

    rt = run()
    tolerance = rt.reports[0].verification.tolerance
    assert tolerance == 2 * torch.finfo(torch.bfloat16 if kind == "autocast" else kind).eps
    assert 0 < rt.metrics()["verify_max_error"] < tolerance
    torch._dynamo.reset()
    break_a_rule(monkeypatch, 2.0)
    with pytest.raises(cggr_compile.VerificationError):
        run()


def test_leaves_no_trace(monkeypatch):
    """Loss, gradients, selection, dropout, step and hooks of verified training are those of ordinary training."""
    runs = []
    for verify in (0, 1):
        torch._dynamo.reset()
        model = models.family("gpt2", n_layer=1, resid_pdrop=0.3, attn_pdrop=0.2)
        models.compiled(model, verify=verify)
        calls = []
        model.transformer.wte.weight.register_hook(lambda grad, calls=calls: calls.append(1))
        torch.manual_seed(7)
        for _ in range(2):
            loss = model(**models.make_batch()).loss
            assert not calls and all(p.grad is None for p in model.parameters())
            run = backward(model, loss)
            assert len(calls) == 1
            calls.clear()
        rt = cggr_compile.runtime(model)
        runs.append((run, rt.selected, torch.get_rng_state(), rt.metrics()["step"]))
        assert rt.metrics()["verify_steps"] == verify
    assert_same(runs[0][0], runs[1][0], 0.0)
    assert all(torch.equal(*pair) for pair in zip(runs[0][1:3], runs[1][1:3], strict=True))
    assert runs[0][3] == runs[1][3] == 2


def test_every_graph_gets_its_own_steps():
    model = models.PlainLM()
    model.compile(backend=models.backend(), dynamic=False, options={"compiler": "eager", "verify": 2})
    rt = cggr_compile.runtime(model)
    for seq in (16, 16, 16, 24):
        model(**models.make_batch(2, seq)).loss.backward()
    assert rt.metrics()["verify_steps"] == 3 and [r.verification.steps for r in rt.reports] == [2, 1]


def test_gradients_of_other_inputs_and_names_without_modules():
    model = models.Functional()
    batch = models.make_batch()
    loss = models.compiled(
        lambda params: F.cross_entropy(model(params, batch["input_ids"]).flatten(0, 1), batch["labels"].flatten()),
        verify=1,
    )
    inputs = {name: p * 1.0 for name, p in model.params.items()}  # not leaves
    loss(inputs).backward()
    values = cggr_compile.runtime(inputs).metrics()
    assert values["verify_steps"] == 1 and values["verify_worst"].split("'")[-2] in inputs
    assert all(p.grad is not None for p in model.params.values())


def test_buffers_are_written_once():
    class Counting(models.SlicedLoss):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            self.calls.add_(1)
            return super().forward(ids, labels)

    model = models.compiled(Counting(), verify=1)
    model(*models.make_batch().values()).backward()
    assert model.calls == 1 and cggr_compile.runtime(model).metrics()["verify_steps"] == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"row_sparse": False}, "row_sparse is False"),
        ({"min_tokens_ratio": 1.0}, "the graph is not rewritten: min_tokens_ratio is 1.0"),
    ],
)
def test_nothing_to_compare_is_said(options, why, caplog):
    rt = verified(models.PlainLM(), steps=2, **options)
    assert rt.metrics()["verify_steps"] == 0
    (said,) = (r.message for r in caplog.records if r.message.startswith("verify"))
    assert said.startswith(f"verify: nothing to compare: {why}")
    assert f"verified: nothing compared; {why}" in str(cggr_compile.Explanation(rt.reports))


def test_a_selection_that_rounding_changes_is_not_compared(monkeypatch, caplog):
    monkeypatch.setattr("torch.equal", lambda a, b: False)
    rt = verified(models.PlainLM(), verify=1)
    assert rt.metrics()["verify_steps"] == 0 and "changed the selection" in rt.reports[0].verification.note
    assert "changed the selection" in caplog.text


def test_a_dense_gradient_that_overflows_is_not_compared():
    model = models.PlainLM()
    with torch.no_grad():
        nn.init.constant_(model.lm_head.weight, 1e38)
    rt = verified(model, verify=1)
    assert rt.metrics()["verify_steps"] == 0 and "not finite" in rt.reports[0].verification.note


def test_explain_verifies(caplog):
    with caplog.at_level(logging.WARNING):
        explanation = cggr_compile.explain(models.PlainLM(), **models.make_batch(), options={"verify": True})
    assert explanation.graphs[0].verification.steps == 1 and "verified: 1 steps" in str(explanation)
