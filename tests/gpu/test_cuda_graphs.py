"""CUDA graphs: the same training as without them, replayed."""

from __future__ import annotations

import copy

import models
import pytest
import torch

import cggr_compile
from cggr_compile import replay

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


def warmed_up(model, options, steps):
    """Compiled, after some steps; the selection stays the first step's."""
    model = compiled(model, options={"advance": "manual", **options})
    for batch in batches(steps):
        model.zero_grad()
        model(**batch).loss.backward()
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


def assert_close(found, expected):
    """Gradients by name; each to 1e-4 of the norm of them all."""
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-4 * whole, name


def assert_same(history, expected):
    assert len(history) == len(expected)
    for (loss, grads, selected, metrics), (loss_0, grads_0, selected_0, metrics_0) in zip(
        history, expected, strict=True
    ):
        torch.testing.assert_close(loss, loss_0, rtol=1e-4, atol=1e-6)
        assert_close(grads, grads_0)
        assert torch.equal(selected, selected_0)
        for key in metrics_0.keys() - {"verify_steps", "verify_max_error", "verify_worst"}:
            wanted = metrics_0[key]
            assert metrics[key] == (pytest.approx(wanted, rel=1e-4) if isinstance(wanted, float) else wanted), key


@pytest.fixture
def launches_do_not_count(monkeypatch):
    """Without graphs a model of this size would train on every token; a mode leaves no place for the option."""
    monkeypatch.setattr("cggr_compile.passes.semantic.launch_bound.LAUNCH_MS", 0.0)
    monkeypatch.setattr("cggr_compile.passes.semantic.launch_bound.LAUNCH_MS_PER_LAYER", 0.0)


@pytest.fixture
def replays(monkeypatch):
    """Counts the CUDA graphs of ours that are replayed, two a step, and Inductor's (evaluation)."""
    from torch._inductor.cudagraph_trees import CUDAGraphNode

    seen = []
    original, captured = CUDAGraphNode.run, replay.captured

    def run(self, new_inputs):
        seen.append("Inductor")
        return original(self, new_inputs)

    def counted(*arguments):
        again, result = captured(*arguments)
        return lambda: (seen.append("ours"), again())[1], result

    monkeypatch.setattr(CUDAGraphNode, "run", run)
    monkeypatch.setattr(replay, "captured", counted)
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
    assert replays == ["ours"] * 2 * (STEPS - 1), "forward and backward of every step after the first"
    assert_same(history, expected)


@pytest.mark.parametrize(
    ("mode", "layers"), [("reduce-overhead", 4), pytest.param("max-autotune", 1, marks=pytest.mark.slow)]
)
def test_the_mode(mode, layers, replays):
    model = models.family("llama", num_hidden_layers=layers)
    expected = train(compiled(model))
    history = train(compiled(model, mode=mode))
    assert replays == ["ours"] * 2 * (STEPS - 1)
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
    assert "Inductor" in replays[before:]
    assert torch.equal(runtime.selected.cpu(), selected) and runtime.metrics() == metrics


def test_other_recordings_leave_ours_their_memory(replays):
    """PyTorch frees cuBLAS's workspaces whenever Inductor records, and empties its cache whenever anything records."""
    model = models.family("llama")
    expected = train(compiled(model))
    model = compiled(model, options={"cuda_graphs": True})
    runtime, first = cggr_compile.runtime(model), copy.deepcopy(model.state_dict())
    train(model, 3)
    model.eval()
    for batch in batches(3):
        with torch.no_grad():
            model(**batch)
    assert "Inductor" in replays
    torch.cuda.empty_cache()
    junk = torch.full((2**28,), float("nan"), device="cuda")  # where the freed memory was
    model.train()
    model.load_state_dict(first)
    runtime.load_state_dict({"version": 1, "step": 0, "seed": 0})
    before = len(replays)
    assert_same(train(model), expected)
    assert replays[before:] == ["ours"] * 2 * STEPS and junk.isnan().all()


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
    assert replays[before:] == ["ours"] * 2 * len(data)


@pytest.mark.parametrize("allocated", [False, True])
def test_accumulation(allocated, replays):
    """Gradients that are not set to None are added to, whoever allocated them."""
    model, sums = models.family("llama"), []
    for options in ({}, {"cuda_graphs": True}):
        trained = warmed_up(model, options, 2)
        for p in trained.parameters() if allocated else ():
            p.grad = torch.zeros_like(p)
        for batch in batches():
            trained(**batch).loss.backward()
        sums.append({name: p.grad for name, p in trained.named_parameters()})
    assert len(replays) == 2 * (STEPS + 1)
    assert_close(sums[1], sums[0])


def test_two_forwards_before_their_backwards(replays):
    model, found = models.family("llama"), []
    for options in ({}, {"cuda_graphs": True}):
        trained = warmed_up(model, options, 3)
        trained.zero_grad()
        losses = [trained(**batch).loss for batch in batches(2)]
        for loss in losses:
            loss.backward()
        found.append(({name: p.grad for name, p in trained.named_parameters()}, torch.stack(losses).detach()))
    assert len(replays) == 2 * 2 + 2
    assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)


def test_dropout_draws_anew_at_every_replay(replays):
    """... and what seed was set decides."""
    model = models.family("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    trained = compiled(model, options={"cuda_graphs": True, "advance": "manual", "scoring": "random"})
    (batch,) = batches(1)

    def losses(seed):
        torch.manual_seed(seed)
        values = []
        for _ in range(4):
            trained.zero_grad()
            loss = trained(**batch).loss
            loss.backward()
            values.append(float(loss))
        return values

    losses(0)
    first, again, other = losses(1), losses(1), losses(2)
    assert len(replays) >= 2 * 12
    assert first == again and len({*first, *other}) == 8


def test_a_step_that_waits_for_the_device_is_not_recorded(replays):
    """A label check on the host, say: the recording fails, the training does not."""

    def waits(x, w):
        loss = (x * w).sum()
        loss.item()
        return [loss]

    w = torch.nn.Parameter(torch.ones(3, device="cuda"))
    told, model = [], torch.nn.Module()
    run = replay.Replay(waits, [1], w.device, lambda: model, told.append)
    for value in range(4):
        w.grad = None
        run(torch.full((3,), float(value), device="cuda"), w)[0].backward()
        assert w.grad.tolist() == [value] * 3
    assert len(told) == 1 and "recording failed" in told[0] and not replays
    assert torch.ones(3, device="cuda").sum().item() == 3.0


def test_verify_uses_the_graphs_and_leaves_training_alone(replays):
    model = models.family("llama")
    drawn = {"selection": "random"}  # rounding may change a selection by scores, and its step is not compared
    expected = train(compiled(model, options=drawn))
    verified = compiled(model, options={**drawn, "cuda_graphs": True, "verify": 3})
    history = train(verified)
    values = cggr_compile.runtime(verified).metrics()
    assert values["verify_steps"] == 3 and 0 < values["verify_max_error"] < 1e-5
    assert replays[-2 * (STEPS - 3) :] == ["ours"] * 2 * (STEPS - 3)
    assert_same(history, expected)


def test_a_checkpoint_around_a_step_is_not_replayed_and_repeats_its_selection(replays):
    """The recomputation runs in autograd's thread."""
    model = warmed_up(models.family("llama"), {"cuda_graphs": True, "advance": "auto"}, STEPS)
    plain = copy.deepcopy(model)
    plain.compile(backend=models.backend(), dynamic=False)
    first, second = batches(2)
    runtimes = [cggr_compile.runtime(m) for m in (model, plain)]
    runtimes[1].load_state_dict(runtimes[0].state_dict())
    step, found = runtimes[0].metrics()["step"], []
    replays.clear()
    for one, checkpoints in ((model, True), (plain, False)):
        one.zero_grad()

        def loss(switch, one=one):
            return one(**first).loss + 0 * switch

        switch = torch.zeros((), device="cuda", requires_grad=True)
        value = torch.utils.checkpoint.checkpoint(loss, switch, use_reentrant=False) if checkpoints else loss(switch)
        one(**second)
        value.backward()
        found.append({name: p.grad.clone() for name, p in one.named_parameters()})
    assert replays == ["ours"]  # the forward in between
    assert_close(*found)
    assert [runtime.metrics()["step"] for runtime in runtimes] == [step + 2] * 2
