"""Training on a schedule: one captured graph, one compilation per ratio, the ratio in force on record."""

from __future__ import annotations

import copy
import gc
import weakref

import models
import pytest
import torch
from reference import Run, assert_same, backward, collect, dense, hf_reference, overall
from training import as_on_an_accelerator, metrics, picks

import cggr_compile
from cggr_compile import compat
from cggr_compile.readback import Readback
from cggr_compile.variant_dispatcher import VariantDispatcher

LADDER = {"warmup_steps": 3, "ladder": (1.0, 0.5)}
RATIOS = [1.0, 1.0, 0.5, 0.25, 0.25]  # 1, .75, .5, .25
SHORT = {"warmup_steps": 1, "ladder": (1.0,)}  # 1, .25


def tiny():
    return models.PlainLM()


def scheduled(model=None, **options):
    return models.compiled(model or tiny(), **{**LADDER, **options})


def ratios(model, steps, **batch):
    """The ratio of each of some training steps."""
    found = []
    for _ in range(steps):
        model(**(batch or models.make_batch())).loss.backward()
        found.append(metrics(model)["ratio"])
    model.zero_grad()
    return found


def check(model, batch, ratio):
    """Loss and gradients of a step at this ratio; at 1.0 they are the user's bit for bit."""
    output = model(**batch)
    got = backward(model, output.loss)
    assert metrics(model)["ratio"] == ratio
    picked = cggr_compile.runtime(model).selected
    if ratio < 1.0:
        assert tuple(picked.shape) == (len(batch["labels"]), ratio * batch["labels"].shape[1])
        assert_same(got, hf_reference(model, batch, picks(model)))
        assert output.logits.shape[1] == 0
        return
    want = dense(model, batch)
    assert picked is None and metrics(model)["token_ratio"] == 1.0
    assert torch.equal(got.loss, want.loss)
    assert all(torch.equal(got.grads[name], grad) for name, grad in want.grads.items())
    assert output.logits.shape == (*batch["labels"].shape, models.VOCAB)


@pytest.fixture
def compilations(monkeypatch):
    """One entry for each graph that AOTAutograd compiles."""
    seen = []
    original = compat.aot_eager

    def aot_eager(gm, inputs, partition):
        seen.append(gm)
        return original(gm, inputs, partition)

    monkeypatch.setattr(compat, "aot_eager", aot_eager)
    return seen


def test_each_rung_is_compiled_once_and_when_first_needed():
    built = []

    def compiler(ratio):
        def build(args):
            built.append((ratio, args))
            return ratio

        return build

    variants = VariantDispatcher({(1.0, 0): 1.0}, {(r, 0): compiler(r) for r in (0.5, 0.25)})
    ran = [variants.at(variants.nearest(wanted), (wanted,)) for wanted in (1.0, 0.8, 0.5, 0.3, 0.5, 0.25, 0.1, 1.0)]
    assert built == [(0.5, (0.5,)), (0.25, (0.25,))]
    assert ran == [1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 1.0]


def test_a_variant_that_cannot_be_compiled_is_tried_again():
    def fail(args):
        raise RuntimeError("no compiler today")

    variants = VariantDispatcher({}, {(0.5, 0): fail})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no compiler today"):
            variants.at(0.5, ())


def test_curriculum_over_the_whole_ladder(compilations):
    """Every step's loss and gradients are those of its ratio, and Dynamo captures the model once."""
    model, batch = scheduled(), models.make_batch()
    rt = cggr_compile.runtime(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, ratio in enumerate(RATIOS):
            check(model, batch, ratio)
            assert metrics(model)["step"] == step + 1
            assert len(compilations) == {1.0: 0, 0.5: 1, 0.25: 2}[ratio]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert {report.ratio: report.matched for report in rt.reports} == {1.0: False, 0.5: True, 0.25: True}
    assert all(report.record("row_sparse").matched for report in rt.reports if report.ratio < 1.0)


@pytest.mark.slow
def test_through_inductor():
    """The dense rung is the compiled model itself; the other is compiled without Dynamo."""
    batch, plain = models.make_batch(), tiny()
    model = scheduled(copy.deepcopy(plain), compiler="inductor", **SHORT)
    plain.compile(backend=models.backend(), options={"min_tokens_ratio": 1.0, "compiler": "inductor"})
    got, want = backward(model, model(**batch).loss), backward(plain, plain(**batch).loss)
    assert torch.equal(got.loss, want.loss)
    assert all(torch.equal(got.grads[name], grad) for name, grad in want.grads.items())
    check(model, batch, 0.25)
    assert cggr_compile.runtime(model).reports[0].compiler == "Inductor CPU"


@pytest.mark.slow
def test_sizes_that_change():
    """With the second size Dynamo's sizes become symbolic; every size has rungs of its own."""
    model, batch, other = scheduled(**SHORT), models.make_batch(), models.make_batch(3, 24)
    rt = cggr_compile.runtime(model)
    assert ratios(model, 1, **batch) == [1.0]
    check(model, other, 0.25)
    rt.load_state_dict({"version": 1, "step": 0, "seed": 0})
    check(model, other, 1.0)  # compiled after the capture
    check(model, batch, 0.25)
    check(model, other, 0.25)
    assert all(r.record("row_sparse").matched for r in rt.reports if r.ratio < 1.0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_symbolic_sizes_are_compiled_at_the_capture(compilations):
    """Guards on them can only be given to Dynamo then."""
    model = scheduled(row_sparse=False, **SHORT)  # leaves them symbolic
    ratios(model, 1)
    assert not compilations
    rt = cggr_compile.runtime(model)
    for size, seq, step in [(3, 24, 0), (4, 32, 1), (2, 40, 0)]:
        rt.load_state_dict({"version": 1, "step": step, "seed": 0})
        batch = models.make_batch(size, seq)
        got = backward(model, model(**batch).loss)
        assert metrics(model)["ratio"] == (0.25 if step else 1.0)
        assert_same(got, hf_reference(model, batch, picks(model)) if step else dense(model, batch))
        assert len(compilations) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_compiled_later_under_autocast():
    model, batch = scheduled(**SHORT), models.make_batch()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            got = backward(model, model(**batch).loss)
    assert metrics(model)["ratio"] == 0.25
    with torch.autocast("cpu", torch.bfloat16):
        want = hf_reference(model, batch, picks(model))
    exact = hf_reference(model, batch, picks(model))
    assert overall(got, exact) < 1.5 * overall(want, exact) + 1e-3


def test_gradient_accumulation_advances_by_hand():
    model = scheduled(advance="manual", **SHORT)
    batches = [models.make_batch(seed=seed) for seed in (3, 4)]
    rt = cggr_compile.runtime(model)
    for ratio in (1.0, 0.25):
        model.zero_grad()
        losses, parts = [], []
        for batch in batches:
            losses.append(model(**batch).loss)
            losses[-1].backward()
            assert metrics(model)["ratio"] == ratio
            parts.append((batch, None if rt.selected is None else picks(model)))
        got = collect(model, sum(losses))
        rt.step()
        runs = [dense(model, b) if picked is None else hf_reference(model, b, picked) for b, picked in parts]
        assert_same(got, Run(sum(r.loss for r in runs), {n: sum(r.grads[n] for r in runs) for n in got.grads}))


@pytest.mark.slow
def test_resumes_exactly():
    """Ratio, selection and loss of the steps after a checkpoint within a step, with figures under way."""
    options = {"warmup_steps": 2, "dynamic_threshold": True, "threshold_sensitivity": 1.0, "advance": "manual"}
    batch = models.make_batch()

    def steps(model, numbers):
        rt, history = cggr_compile.runtime(model), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for number in numbers:
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            history.append((rt.metrics()["ratio"], loss.detach(), rt.selected))
            if number % 2:
                rt.step()
        return history

    model = scheduled(**options, seed=5)
    steps(model, range(5))
    weights, state = copy.deepcopy(model.state_dict()), cggr_compile.runtime(model).state_dict()
    assert state["seed"] == 5 and state["step"] == 2
    assert None not in [state["schedule"][name] for name in ("target", "confidence", "figures")]
    expected = steps(model, range(5, 9))
    other = scheduled(**options, seed=1)
    other.load_state_dict(weights)
    cggr_compile.runtime(other).load_state_dict(state)
    for (ratio, loss, picked), (ratio_0, loss_0, picked_0) in zip(steps(other, range(5, 9)), expected, strict=True):
        assert ratio == ratio_0 and torch.equal(picked, picked_0)
        torch.testing.assert_close(loss, loss_0)


def test_dynamic_threshold_follows_the_router(monkeypatch):
    """A model that becomes sure trains on fewer tokens, one that is lost on more; a step late."""
    model = scheduled(warmup_steps=0, ladder=(0.5, 0.125), dynamic_threshold=True, threshold_sensitivity=1.0)
    confidence = 0.5
    original = Readback.receive

    def receive(self):
        figures = original(self)
        return figures and [*figures[:2], confidence, *figures[3:]]

    monkeypatch.setattr(Readback, "receive", receive)
    assert ratios(model, 2) == [0.25, 0.25]
    confidence = 0.95
    assert ratios(model, 2) == [0.125, 0.125]
    confidence = 0.05
    assert ratios(model, 1) == [0.5]


def test_dynamic_threshold_sees_the_router_at_ratio_one():
    model, batch = scheduled(warmup_steps=10, dynamic_threshold=True), models.make_batch()
    got, want = backward(model, model(**batch).loss), dense(model, batch)
    values = metrics(model)
    assert torch.equal(got.loss, want.loss)
    assert all(torch.equal(got.grads[name], grad) for name, grad in want.grads.items())
    assert values["ratio"] == values["token_ratio"] == 1.0 and 0 < values["avg_confidence"] < 1
    assert cggr_compile.runtime(model).state_dict()["schedule"]["figures"][2] == pytest.approx(values["avg_confidence"])


def test_a_graph_that_cannot_be_rewritten_has_no_ladder():
    model = scheduled(fallback="silent")
    loss = model(input_ids=models.make_batch()["input_ids"]).logits.sum()  # no loss in it
    loss.backward()
    (report,) = cggr_compile.runtime(model).reports
    assert not report.matched and "no cross-entropy" in report.reason and metrics(model)["ratio"] == 1.0


def test_report_dumps_and_verification_of_every_rung(tmp_path):
    model = scheduled(dump_dir=str(tmp_path), verify=1, **SHORT)
    rt = cggr_compile.runtime(model)
    ratios(model, 1)
    text = str(cggr_compile.Explanation(rt.reports))
    assert "eager · ratio 1 " in text and "eager · ratio 0.25 · not needed so far" in text
    assert (tmp_path / "graph_01" / "report.json").exists()
    assert '"waiting": true' in (tmp_path / "report.json").read_text()
    ratios(model, 2)
    assert '"waiting": false' in (tmp_path / "report.json").read_text()
    assert {r.ratio: r.verification and r.verification.steps for r in rt.reports} == {1.0: None, 0.25: 1}
    before = rt.state_dict()
    explanation = cggr_compile.explain(model, **models.make_batch())
    assert explanation.matched and [graph.ratio for graph in explanation.graphs] == [0.25]
    assert rt.state_dict() == before


def test_waiting_rungs_keep_neither_model_nor_batch_alive():
    model = scheduled()
    batch = models.make_batch()
    alive = [weakref.ref(tensor) for tensor in (batch["labels"], model.lm_head.weight)]
    ratios(model, 1, **batch)
    del model, batch
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


@pytest.mark.parametrize(
    ("options", "figures"),
    [
        ({"dynamic_threshold": True, "warmup_steps": 2}, [8.0, 29.0, 0.9, 1.0, 1.0]),
        ({"min_tokens_ratio": "auto", "measure_every": 1, "warmup_steps": 0}, [1.0, 10.0]),
    ],
    ids=["dynamic", "auto"],
)
def test_no_step_of_a_schedule_reads_a_number(options, figures, monkeypatch):
    """Nothing becomes a Python number in a step, but for figures that have arrived on the host."""
    receive = Readback.receive
    as_on_an_accelerator(monkeypatch)
    monkeypatch.setattr(Readback, "receive", receive)
    model, batch = tiny(), models.make_batch()
    scheduled(model, ladder=(1.0, 0.2), **options)
    rt = cggr_compile.runtime(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monkeypatch.setattr(Readback, "_numbers", lambda self: figures)

    def steps():
        rt.load_state_dict({"version": 1, "step": 0, "seed": 0})
        for ratio in (1.0, 1.0, 0.2, 0.2):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            assert rt._last.ratio == ratio

    steps()
    with monkeypatch.context() as trap:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
            trap.setattr(torch.Tensor, name, lambda *a, name=name, **k: pytest.fail(f"Tensor.{name} in a step"))
        steps()
        with pytest.raises(pytest.fail.Exception, match=r"Tensor\.tolist"):
            rt.metrics()


@pytest.mark.parametrize("state", [{"schedule": 3}, {"schedule": {"confidence": "high"}}, {"schedule": {"rung": 1}}])
def test_bad_schedule_in_a_state(state):
    rt = cggr_compile.runtime(models.Decoder())
    with pytest.raises(ValueError, match="schedule"):
        rt.load_state_dict({**rt.state_dict(), **state})
