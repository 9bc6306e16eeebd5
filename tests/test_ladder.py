"""Training on a schedule: one captured graph, one compilation per ratio, the ratio in force on record."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import contextmanager

import models
import pytest
import torch
from reference import assert_same, backward, collect, dense, hf_reference
from torch.utils._python_dispatch import TorchDispatchMode
from training import metrics, selected, small

import cggr_compile
from cggr_compile import compat
from cggr_compile.ladder import Ladder
from cggr_compile.readback import Readback

LADDER = {"warmup_steps": 4, "ladder": (1.0, 0.5)}  # 1, 1 (.8125), 1 (.625), .5 (.4375), .25
RATIOS = [1.0, 1.0, 1.0, 0.5, 0.25, 0.25]


def scheduled(model=None, **options):
    return models.compiled(model or small(num_hidden_layers=1), **{**LADDER, **options})


def ratios(model, steps, **batch):
    """The ratio of each of some training steps."""
    found = []
    for _ in range(steps):
        model(**(batch or models.make_batch())).loss.backward()
        found.append(metrics(model)["ratio"])
    return found


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


def test_each_rung_is_compiled_once_and_when_first_needed(compilations):
    ran = []
    ladder = Ladder({1.0: ran.append}, {r: lambda args, r=r: compilations.append(r) or ran.append for r in (0.5, 0.25)},
                    lambda: wanted)  # fmt: skip
    for wanted in (1.0, 0.8, 0.5, 0.3, 0.5, 0.25, 0.1, 1.0):
        ladder.run(wanted)
    assert compilations == [0.5, 0.25] and len(ran) == 8


def test_a_rung_that_cannot_be_compiled_is_tried_again():
    def fail(args):
        raise RuntimeError("no compiler today")

    ladder = Ladder({}, {0.5: fail}, lambda: 0.5)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no compiler today"):
            ladder.run()


def test_curriculum_over_the_whole_ladder(compilations):
    """Every step's loss and gradients are those of its ratio; at 1.0 bit for bit the user's."""
    model, batch = small(), models.make_batch()
    scheduled(model)
    rt = cggr_compile.runtime(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, ratio in enumerate(RATIOS):
            got = backward(model, model(**batch).loss)
            assert metrics(model)["ratio"] == ratio and metrics(model)["step"] == step + 1
            assert len(compilations) == {1.0: 0, 0.5: 1, 0.25: 2}[ratio]
            if ratio == 1.0:
                want = dense(model, batch)
                assert rt.selected is None and metrics(model)["token_ratio"] == 1.0
                assert torch.equal(got.loss, want.loss)
                assert all(torch.equal(got.grads[name], grad) for name, grad in want.grads.items())
            else:
                assert tuple(rt.selected.shape) == (2, ratio * models.SEQ)
                assert_same(got, hf_reference(model, batch, selected(model)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert {report.ratio: report.matched for report in rt.reports} == {1.0: False, 0.5: True, 0.25: True}


def test_through_inductor_the_dense_rung_is_the_compiled_model_itself():
    batch = models.make_batch()
    plain = small(num_hidden_layers=1)
    model = scheduled(copy.deepcopy(plain), compiler="inductor", warmup_steps=1, ladder=(1.0,))
    plain.compile(backend=models.backend(), options={"min_tokens_ratio": 1.0, "compiler": "inductor"})
    got, want = backward(model, model(**batch).loss), backward(plain, plain(**batch).loss)
    assert torch.equal(got.loss, want.loss)
    assert all(torch.equal(got.grads[name], grad) for name, grad in want.grads.items())
    got = backward(model, model(**batch).loss)  # compiled now, without Dynamo
    assert metrics(model)["ratio"] == 0.25
    assert_same(got, hf_reference(model, batch, selected(model)))


def test_sizes_that_change():
    """The second size makes Dynamo's sizes symbolic; a graph of its own has its own rungs."""
    model = scheduled()
    assert ratios(model, 4) == RATIOS[:4]
    other = models.make_batch(3, 24)
    for ratio in RATIOS[4:]:
        got = backward(model, model(**other).loss)
        assert metrics(model)["ratio"] == ratio
        assert_same(got, hf_reference(model, other, selected(model)))
    cggr_compile.runtime(model).load_state_dict({"version": 1, "step": 0, "seed": 0})
    got = backward(model, model(**other).loss)  # at 1.0, compiled after the capture
    assert_same(got, dense(model, other))
    assert ratios(model, 3) == RATIOS[1:4], "back to the first size"


def test_symbolic_sizes_are_compiled_at_the_capture(compilations):
    """Guards on symbolic sizes can only be given to Dynamo then."""
    model = scheduled(row_sparse=False)  # keeps them symbolic
    ratios(model, 1)
    assert not compilations
    torch._dynamo.reset()
    model = models.compiled(small(num_hidden_layers=1), row_sparse=False, **LADDER)
    torch._dynamo.config.automatic_dynamic_shapes, before = True, torch._dynamo.config.automatic_dynamic_shapes
    try:
        for size, seq in [(2, 16), (3, 24), (4, 32), (2, 40)]:
            batch = models.make_batch(size, seq)
            got = backward(model, model(**batch).loss)
            ratio = metrics(model)["ratio"]
            assert_same(got, dense(model, batch) if ratio == 1.0 else hf_reference(model, batch, selected(model)))
    finally:
        torch._dynamo.config.automatic_dynamic_shapes = before
    assert len(compilations) == 2, "one symbolic graph, at 0.5 and 0.25"


def test_under_autocast():
    model, batch = small(), models.make_batch()
    scheduled(model)
    for ratio in RATIOS:
        with torch.autocast("cpu", torch.bfloat16):
            got = backward(model, model(**batch).loss)
            assert metrics(model)["ratio"] == ratio
            want = dense(model, batch) if ratio == 1.0 else hf_reference(model, batch, selected(model))
        assert abs(got.loss - want.loss) < 0.01 * want.loss
        for name, grad in want.grads.items():
            assert (got.grads[name] - grad).norm() <= 0.05 * grad.norm() + 1e-4, name


def test_gradient_accumulation_advances_by_hand():
    model = small()
    scheduled(model, advance="manual")
    batches = [models.make_batch(seed=seed) for seed in (3, 4)]
    rt = cggr_compile.runtime(model)
    for ratio in RATIOS:
        model.zero_grad()
        losses, wanted = [], []
        for batch in batches:
            losses.append(model(**batch).loss)
            losses[-1].backward()
            assert metrics(model)["ratio"] == ratio
            wanted.append((batch, None if ratio == 1.0 else selected(model)))
        got = collect(model, sum(losses))
        rt.step()
        parts = [dense(model, b) if picks is None else hf_reference(model, b, picks) for b, picks in wanted]
        assert_same(got, type(got)(sum(p.loss for p in parts), {n: sum(p.grads[n] for p in parts) for n in got.grads}))


@pytest.mark.parametrize("manual", [False, True], ids=["auto", "manual"])
def test_resumes_exactly(manual):
    """Ratio, selection and gradients of the steps after a checkpoint, with a threshold that follows the model."""
    options = {"warmup_steps": 3, "ladder": (1.0, 0.5), "dynamic_threshold": True, "threshold_sensitivity": 1.0}
    options["advance"] = "manual" if manual else "auto"
    batch = models.make_batch()

    def steps(model, count):
        rt, history = cggr_compile.runtime(model), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(count):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            picked = None if rt.selected is None else rt.selected.clone()
            history.append((rt.metrics()["ratio"], loss.detach(), picked))
            if manual and len(history) % 2:
                rt.step()
        return history

    model = scheduled(small(num_hidden_layers=1), **options, seed=5)
    steps(model, 4)
    weights, state = copy.deepcopy(model.state_dict()), cggr_compile.runtime(model).state_dict()
    expected = steps(model, 3)
    other = scheduled(small(num_hidden_layers=1), **options, seed=1)
    other.load_state_dict(weights)
    cggr_compile.runtime(other).load_state_dict(state)
    assert state["seed"] == 5 and state["schedule"]["confidence"] is not None
    for (ratio, loss, picked), (ratio_0, loss_0, picked_0) in zip(steps(other, 3), expected, strict=True):
        assert ratio == ratio_0 and torch.equal(loss, loss_0)
        assert picked is picked_0 is None or torch.equal(picked, picked_0)


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
    model, batch = small(), models.make_batch()
    scheduled(model, warmup_steps=10, ladder=(1.0,), dynamic_threshold=True)
    got, want = backward(model, model(**batch).loss), dense(model, batch)
    values = metrics(model)
    assert torch.equal(got.loss, want.loss)
    assert all(torch.equal(got.grads[name], grad) for name, grad in want.grads.items())
    assert values["ratio"] == values["token_ratio"] == 1.0 and 0 < values["avg_confidence"] < 1
    assert cggr_compile.runtime(model).state_dict()["schedule"]["confidence"] == pytest.approx(values["avg_confidence"])


def test_logits_are_the_users_own_at_ratio_one():
    model, batch = scheduled(), models.make_batch()
    assert model(**batch).logits.shape == (2, models.SEQ, models.VOCAB)
    ratios(model, 3)
    assert model(**batch).logits.shape == (2, 0, models.VOCAB)


def test_a_graph_that_cannot_be_rewritten_has_no_ladder():
    model = scheduled(fallback="silent")
    loss = model(input_ids=models.make_batch()["input_ids"]).logits.sum()  # no loss in it
    loss.backward()
    (report,) = cggr_compile.runtime(model).reports
    assert not report.matched and "no cross-entropy" in report.reason and metrics(model)["ratio"] == 1.0


def test_report_and_dumps_of_every_rung(tmp_path):
    model = scheduled(dump_dir=str(tmp_path))
    ratios(model, 4)
    text = str(cggr_compile.Explanation(cggr_compile.runtime(model).reports))
    assert "ratio 1\n" in text and "ratio 0.5\n" in text and "ratio 0.25 · not needed so far" in text
    assert (tmp_path / "graph_02" / "report.json").exists()
    assert '"waiting": true' in (tmp_path / "report.json").read_text()
    ratios(model, 1)
    assert '"waiting": false' in (tmp_path / "report.json").read_text()
    before = cggr_compile.runtime(model).state_dict()
    explanation = cggr_compile.explain(model, **models.make_batch())
    assert explanation.matched and [graph.ratio for graph in explanation.graphs] == [0.25]
    assert cggr_compile.runtime(model).state_dict() == before


def test_verify_compares_every_rung():
    model = scheduled(verify=1)
    ratios(model, 6)
    reports = cggr_compile.runtime(model).reports
    assert {r.ratio: r.verification and r.verification.steps for r in reports} == {1.0: None, 0.5: 1, 0.25: 1}


def test_waiting_rungs_keep_neither_model_nor_batch_alive():
    model = scheduled()
    batch = models.make_batch()
    alive = [weakref.ref(tensor) for tensor in (batch["labels"], model.lm_head.weight)]
    ratios(model, 1, **batch)
    del model, batch
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


class NoReadings(TorchDispatchMode):
    """Raises where a tensor becomes a Python number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a step has waited for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def trap(monkeypatch):
    """No tensor becomes a Python number, but for figures that have arrived on the host."""
    with monkeypatch.context() as patch, NoReadings():
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, lambda *a, name=name, **k: pytest.fail(f"Tensor.{name} in a step"))
        patch.setattr(Readback, "_numbers", lambda self: [8.0, 29.0, 0.9, 1.0, 1.0])
        yield


def test_no_step_of_a_schedule_reads_a_number(monkeypatch):
    model, batch = small(num_hidden_layers=1), models.make_batch()
    monkeypatch.setattr("cggr_compile.backend._checks_labels_every_step", lambda device: False)
    scheduled(model, dynamic_threshold=True, warmup_steps=2, ladder=(1.0, 0.5))
    rt = cggr_compile.runtime(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    seen = []
    for _ in range(2):  # compile every rung, then walk over them again
        rt.load_state_dict({"version": 1, "step": 0, "seed": 0})
        for _ in range(4):
            with trap(monkeypatch) if len(seen) >= 4 else monkeypatch.context():
                step()
            seen.append(metrics(model)["ratio"])
    assert seen[4:] == [1.0, 0.5, 0.1875, 0.1875]
    with pytest.raises(AssertionError, match="waited"), NoReadings():
        torch.ones(1).item()


@pytest.mark.parametrize("state", [{"schedule": 3}, {"schedule": {"confidence": "high"}}, {"schedule": {"rung": 1}}])
def test_bad_schedule_in_a_state(state):
    rt = cggr_compile.runtime(models.Decoder())
    with pytest.raises(ValueError, match="schedule"):
        rt.load_state_dict({**rt.state_dict(), **state})
