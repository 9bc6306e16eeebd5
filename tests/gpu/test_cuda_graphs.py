"""CUDA graphs: the same training as without them, replayed."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from torch._dynamo.utils import counters

import cggr_compile

pytestmark = pytest.mark.usefixtures("launches_do_not_count")
STEPS = 6  # the first runs warm up, the second records, the others replay


def batches(count=STEPS):
    made = [models.make_batch(4, 64, seed=seed) for seed in range(count)]
    return [{name: tensor.cuda() for name, tensor in batch.items()} for batch in made]


def compiled(model, **arguments):
    torch._dynamo.reset()
    model = copy.deepcopy(model).cuda()
    model.compile(backend=models.backend(), dynamic=False, **arguments)
    return model


def train(model, steps=STEPS):
    """Loss, gradients, selected positions and metrics of every step."""
    runtime = cggr_compile.runtime(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    history = []
    for batch in batches(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        # the selected positions are not copied here: later replays must leave them alone
        history.append((loss.detach().clone(), grads, runtime.selected, runtime.metrics()))
        optimizer.step()
    assert runtime.metrics()["matched"] and runtime.reports[0].compiler == "Inductor CUDA"
    return history


def assert_same(history, expected):
    assert len(history) == len(expected)
    for (loss, grads, selected, metrics), (loss_0, grads_0, selected_0, metrics_0) in zip(
        history, expected, strict=True
    ):
        torch.testing.assert_close(loss, loss_0, rtol=1e-4, atol=1e-6)
        whole = torch.stack([g.norm() for g in grads_0.values()]).norm()
        for name, grad in grads_0.items():
            assert (grads[name] - grad).norm() <= 1e-4 * whole, name
        assert torch.equal(selected, selected_0)
        for key in metrics_0.keys() - {"verify_steps", "verify_max_error", "verify_worst"}:
            wanted = metrics_0[key]
            assert metrics[key] == (pytest.approx(wanted, rel=1e-4) if isinstance(wanted, float) else wanted), key


@pytest.fixture
def launches_do_not_count(monkeypatch):
    """Without graphs a model of this size would train on every token; a mode leaves no place for the option."""
    monkeypatch.setattr("cggr_compile.passes.launch_bound.LAUNCH_MS", 0.0)
    monkeypatch.setattr("cggr_compile.passes.launch_bound.LAUNCH_MS_PER_LAYER", 0.0)


@pytest.fixture
def replays(monkeypatch):
    """Counts the CUDA graphs that are replayed."""
    from torch._inductor.cudagraph_trees import CUDAGraphNode

    seen = []
    original = CUDAGraphNode.run

    def run(self, new_inputs):
        seen.append(1)
        return original(self, new_inputs)

    monkeypatch.setattr(CUDAGraphNode, "run", run)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_gradient": "stop"},
        {"selection": "topk", "kv_gradient": "stop"},
        {"gradient": "exact", "scoring": "random"},
        {"row_sparse": False},
    ],
    ids=str,
)
def test_the_option(options, replays):
    model = models.family("llama")
    expected = train(compiled(model, options=options))
    assert not replays
    history = train(compiled(model, options={"cuda_graphs": True, **options}))
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert len(replays) >= 2 * (STEPS - 2), "forward and backward of every step after the second"
    assert_same(history, expected)


@pytest.mark.parametrize(
    ("mode", "layers"), [("reduce-overhead", 4), pytest.param("max-autotune", 1, marks=pytest.mark.slow)]
)
def test_the_mode(mode, layers, replays):
    model = models.family("llama", num_hidden_layers=layers)
    expected = train(compiled(model))
    history = train(compiled(model, mode=mode))
    assert counters["inductor"]["cudagraph_skips"] == 0 and len(replays) >= 2 * (STEPS - 2)
    assert_same(history, expected)


def test_max_autotune_without_graphs(replays):
    model = compiled(models.family("llama", num_hidden_layers=1), mode="max-autotune-no-cudagraphs")
    train(model, 3)
    assert not replays


def test_the_last_figures_survive_other_replays(replays):
    """Evaluation replays graphs of its own in the same memory pool."""
    model = compiled(models.family("llama"), options={"cuda_graphs": True})
    train(model, 4)
    runtime = cggr_compile.runtime(model)
    selected, metrics = runtime.selected.cpu(), runtime.metrics()
    before = len(replays)
    model.eval()
    for batch in batches(6):
        with torch.no_grad():
            model(**batch)
    assert len(replays) > before
    assert torch.equal(runtime.selected.cpu(), selected) and runtime.metrics() == metrics


def test_a_replayed_step_does_not_synchronise(replays):
    model = compiled(models.family("llama"), options={"cuda_graphs": True})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = batches()

    def steps():
        for batch in data:
            optimizer.zero_grad(set_to_none=True)
            model(**batch).loss.backward()
            optimizer.step()

    steps()
    before = len(replays)
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(replays) >= before + 2 * len(data)


def test_accumulation_onto_gradients_allocated_before():
    """What the README asks for: a gradient that a replay returns is overwritten by the next one."""
    model = models.family("llama")
    sums = []
    for options in ({}, {"cuda_graphs": True}):
        trained = compiled(model, options=options)
        for p in trained.parameters():
            p.grad = torch.zeros_like(p)
        for batch in batches():
            trained(**batch).loss.backward()
        sums.append({name: p.grad for name, p in trained.named_parameters()})
    whole = torch.stack([g.norm() for g in sums[0].values()]).norm()
    for name, grad in sums[0].items():
        assert (sums[1][name] - grad).norm() <= 1e-4 * whole, name


def test_verify_uses_the_graphs_and_leaves_training_alone(replays):
    model = models.family("llama")
    expected = train(compiled(model))
    verified = compiled(model, options={"cuda_graphs": True, "verify": 3})
    history = train(verified)
    values = cggr_compile.runtime(verified).metrics()
    assert values["verify_steps"] == 3 and 0 < values["verify_max_error"] < 1e-5
    assert counters["inductor"]["cudagraph_skips"] == 0 and len(replays) >= 2 * (STEPS - 3)
    assert_same(history, expected)
