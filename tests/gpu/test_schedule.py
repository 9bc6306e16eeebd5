"""Schedules on an accelerator: no host synchronisation, the same ratios as on the CPU, CUDA graphs."""

from __future__ import annotations

import models
import pytest
import torch
from reference import Picks, dense, hf_reference
from torch._dynamo.utils import counters

import cggr_compile
from cggr_compile.readback import Readback

LADDER = {"warmup_steps": 3, "ladder": (1.0, 0.5)}
RATIOS = [1.0, 1.0, 0.5, 0.25, 0.25]


def scheduled(**options):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = models.family("llama").cuda()
    options = {**LADDER, "compiler": "inductor", **options}
    return models.compiled(model, **options)


def batches(count):
    made = [models.make_batch(4, 64, seed=seed) for seed in range(count)]
    return [{name: tensor.cuda() for name, tensor in batch.items()} for batch in made]


def restart(rt):
    rt.load_state_dict({"version": 1, "step": 0, "seed": 0})
    rt.state(torch.device("cuda", torch.cuda.current_device()))  # resuming copies step and seed to the device


def train(model, data):
    """The ratio of each step. ``metrics()`` would wait for the device."""
    rt, found = cggr_compile.runtime(model), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in data:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        found.append(rt._last.ratio)
    return found


def test_every_step_equals_its_reference():
    model = scheduled()
    rt, data = cggr_compile.runtime(model), models.make_batch(4, 64)
    cpu = models.family("llama")
    for ratio in RATIOS:
        model.zero_grad()
        model(**{name: tensor.cuda() for name, tensor in data.items()}).loss.backward()
        assert rt.metrics()["ratio"] == ratio
        want = dense(cpu, data) if ratio == 1.0 else hf_reference(cpu, data, Picks(rt.selected.cpu(), rt.weights.cpu()))
        whole = want.norm()
        for name, parameter in model.named_parameters():
            assert (parameter.grad.cpu() - want.grads[name]).norm() <= 1e-4 * whole, name
    assert counters["stats"]["unique_graphs"] == 1


AUTO = {"min_tokens_ratio": "auto", "warmup_steps": 0, "measure_every": 2, "variance_bound": 100.0}


@pytest.mark.parametrize(
    "options",
    [{}, {"dynamic_threshold": True}, {"cuda_graphs": True}, AUTO, {**AUTO, "cuda_graphs": True}],
    ids=str,
)
def test_a_schedule_does_not_synchronise(options):
    model = scheduled(**options)
    rt, data = cggr_compile.runtime(model), batches(12)
    for _ in range(3):  # compile, warm up and record every rung
        restart(rt)
        seen = train(model, data)
    torch.cuda.synchronize()
    restart(rt)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = train(model, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert again[0] == seen[0] == 1.0 and len(set(again)) >= 2
    if options.get("min_tokens_ratio") == "auto":
        assert 0.0 < rt.metrics()["concentration"] <= 1.0
    if not options.get("dynamic_threshold") and "min_tokens_ratio" not in options:  # those may be a step or two late
        assert again == seen == RATIOS[:3] + [0.25] * 9


def test_figures_arrive_without_waiting():
    figures, busy = Readback(), torch.randn(4096, 4096, device="cuda")

    def work(times):
        product = busy
        for _ in range(times):
            product = torch.mm(product, busy).sign()
        return product[0, :5]

    figures.send(work(1))  # loads the kernels, allocates the memory
    torch.cuda.synchronize()
    assert figures.receive() is not None
    torch.cuda.set_sync_debug_mode("error")
    try:
        last = work(100)
        figures.send(last)
        early = figures.receive()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert early is None, "the device cannot have finished"
    assert figures.wait() == last.tolist() == figures.receive()
    assert figures.receive() is None


def test_dynamic_threshold_arrives_within_two_steps(monkeypatch):
    original, confidence = Readback._numbers, [0.5]

    def numbers(self):
        figures = original(self)
        return [*figures[:2], *confidence, *figures[3:]]

    monkeypatch.setattr(Readback, "_numbers", numbers)
    options = {"warmup_steps": 0, "ladder": (0.5, 0.125), "dynamic_threshold": True, "threshold_sensitivity": 1.0}
    model = scheduled(**options)
    for confidence[0], ratio in [(0.5, 0.25), (0.95, 0.125), (0.05, 0.5)]:
        train(model, batches(1))
        torch.cuda.synchronize()
        assert train(model, batches(3))[-1] == ratio
        torch.cuda.synchronize()
