"""Recorded steps on a machine without a GPU: graphs are stood in for by functions that write over their first result.

What the stand-in's forward keeps for its backward is one piece of memory, as in a recording; tests/gpu has the rest.
"""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter

from cggr_compile import replay

CPU = torch.device("cpu")
captured = replay.captured


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    monkeypatch.setattr(replay, "_POOLS", weakref.WeakValueDictionary())


@pytest.fixture(autouse=True)
def recordings(monkeypatch):
    """Counts recorded graphs and their replays; a replay writes over the results of the recording."""
    counts = SimpleNamespace(recorded=0, replayed=0)

    def leaves(result):
        found = [x for part in result for x in (part if isinstance(part, list) else [part])]
        return [x for x in found if isinstance(x, torch.Tensor)]

    def captured(function, pool, stream):
        counts.recorded += 1
        result = function()

        def again():
            counts.replayed += 1
            for old, new in zip(leaves(result), leaves(function()), strict=True):
                with torch.no_grad():
                    old.copy_(new)

        return again, result

    monkeypatch.setattr(replay, "captured", captured)
    return counts


class Squares:
    """loss = sum((w x)^2) per call, and the products; its backward reads memory that every forward writes."""

    def __init__(self):
        self.kept = {}
        self.calls = 0
        kept = self.kept

        class Step(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, w):
                kept.update(x=x.clone(), y=x * w)
                return (kept["y"] ** 2).sum(), kept["y"].clone()

            @staticmethod
            def backward(ctx, grad, _):
                return None, 2 * grad * kept["y"] * kept["x"]

        self.step = Step

    def __call__(self, x, w, factor):
        self.calls += 1
        loss, products = self.step.apply(x, w)
        return loss, products.detach(), factor


def batch(seed):
    return torch.randn(3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def trained():
    """(replayed function, w, the function behind it, what it was told)"""
    function, told, model = Squares(), [], Model()
    return replay.Replay(function, [1], CPU, lambda: model, told.append), weight(), function, told


class Model:
    """Can be referred to weakly."""


def weight(seed=9):
    return Parameter(batch(seed))


def expected(x, w):
    return (x * w).square().sum(), 2 * x * x * w


def train(run, w, steps, accumulate=False):
    for seed in steps:
        if not accumulate:
            w.grad = None
        before = None if w.grad is None else w.grad.clone()
        x = batch(seed)
        loss, products, factor = run(x, w, 2.0)
        loss.backward()
        want_loss, want_grad = expected(x, w.detach())
        torch.testing.assert_close(loss.detach(), want_loss)
        torch.testing.assert_close(products, (x * w).detach())
        torch.testing.assert_close(w.grad, want_grad if before is None else before + want_grad)
        assert factor == 2.0 and not products.requires_grad
        with torch.no_grad():
            w -= 0.1 * w.grad  # in place: it stays where it is


def test_a_step_is_recorded_at_its_second_call_and_replayed(trained, recordings):
    run, w, function, told = trained
    train(run, w, range(1))
    assert function.calls == 1 and recordings.recorded == 0
    train(run, w, range(1, 6))
    assert recordings.recorded == 2 and recordings.replayed == 2 * 5 and not told


def test_gradients_that_are_kept_are_added_to(trained, recordings):
    run, w, _, _ = trained
    train(run, w, range(3))
    train(run, w, range(7), accumulate=True)
    assert recordings.replayed == 2 * 9


def test_without_looking_after_gradients_they_would_be_wrong(trained, monkeypatch):
    run, w, _, _ = trained
    monkeypatch.setattr(replay.Pool, "keep_gradients", lambda self: None)
    train(run, w, range(3))
    with pytest.raises(AssertionError):
        train(run, w, range(7), accumulate=True)


def test_a_loss_outlives_the_next_step(trained):
    run, w, _, _ = trained
    losses = []
    for seed in range(4):
        loss, *_ = run(batch(seed), w, 2.0)
        loss.backward()
        losses.append(loss.detach())
    for seed, loss in enumerate(losses):
        torch.testing.assert_close(loss, expected(batch(seed), w.detach())[0])


def test_two_forwards_before_their_backwards(trained, recordings):
    run, w, function, told = trained
    train(run, w, range(3))
    w.grad = None
    first, *_ = run(batch(5), w, 2.0)
    assert recordings.replayed == 2 * 2 + 1
    run(batch(6), w, 2.0)
    assert recordings.replayed == 2 * 2 + 1, "the second is no replay: it would write over what the first has kept"
    assert told == ["a forward before the last one's backward runs without CUDA graphs"]
    function.kept.update(x=batch(5), y=batch(5) * w.detach())  # this test's function itself keeps one step only
    first.backward()
    torch.testing.assert_close(w.grad, expected(batch(5), w.detach())[1])
    train(run, w, range(2))
    assert recordings.replayed == 2 * 2 + 2 + 4


def test_a_forward_that_is_given_up_frees_the_next(trained, recordings):
    run, w, _, _ = trained
    train(run, w, range(3))
    run(batch(5), w, 2.0)
    gc.collect()
    calls = recordings.replayed
    train(run, w, range(2))
    assert recordings.replayed == calls + 4


def test_a_loss_is_differentiated_once(trained):
    run, w, _, _ = trained
    train(run, w, range(3))
    loss, *_ = run(batch(5), w, 2.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


def test_other_sizes_and_constants_are_no_replays(trained, recordings):
    run, w, function, _ = trained
    train(run, w, range(3))
    before = recordings.replayed
    calls = function.calls
    loss, products, _ = run(batch(1)[:1], w, 2.0)  # broadcasts
    torch.testing.assert_close(products, (batch(1)[:1] * w).detach())
    assert run(batch(1), w, 3.0)[2] == 3.0
    assert recordings.replayed == before and function.calls == calls + 2
    del loss
    train(run, w, range(2))
    assert recordings.replayed == before + 4


def test_parameters_that_move_are_recorded_anew(trained, recordings):
    run, w, _, _ = trained
    train(run, w, range(3))
    w.data = w.data.clone()
    train(run, w, range(3))
    assert recordings.recorded == 4


def test_models_that_share_a_graph(recordings):
    function, models = Squares(), [Model(), Model()]
    weights = [weight(1), weight(2)]
    now = 0
    run = replay.Replay(function, [1], CPU, lambda: models[now], lambda _: None)
    for step in range(4):
        for now in (0, 1):
            train(run, weights[now], [step], accumulate=True)
    assert recordings.recorded == 4
    gone = weakref.ref(weights[0])
    del models[0], weights[0]
    gc.collect()
    assert len(run._recordings) == 1 and gone() is None


def test_a_pool_lasts_as_long_as_its_recordings():
    """CUDA takes the handle back with the last of them; recording with it again is an error."""
    models = [Model(), Model()]
    runs = [replay.Replay(Squares(), [1], CPU, lambda m=m: m, lambda _: None) for m in models]
    train(runs[0], weight(), range(3))
    first = replay.pool_of(CPU).handle
    train(runs[1], weight(), range(3))
    assert replay.pool_of(CPU).handle is first
    del models[0], runs[0]
    gc.collect()
    assert replay.pool_of(CPU).handle is first
    del models[0], runs[0]
    gc.collect()
    assert replay.pool_of(CPU).handle is not first


def test_gradients_of_inputs(trained, recordings):
    """An input with a gradient is copied in, and its gradient comes out."""
    model, function = Model(), Squares()
    # with the roles changed: the function's second argument is differentiable
    run = replay.Replay(function, [0], CPU, lambda: model, lambda _: None)
    fixed = Parameter(batch(3), requires_grad=False)
    for seed in range(4):
        x = batch(seed).requires_grad_()
        (2 * run(fixed, 3 * x, 1.0)[0]).backward()
        torch.testing.assert_close(x.grad, 2 * 3 * expected(fixed, 3 * x.detach())[1])
    assert recordings.replayed == 2 * 3


def test_copies_of_parameters_leave_the_gradients_alone(trained, recordings):
    """As a measurement beside the training step does: other leaves in the same memory."""
    run, w, _, _ = trained
    train(run, w, range(3))
    kept = w.grad
    before = kept.clone()
    other = w.detach().requires_grad_()
    loss, *_ = run(batch(8), other, 1.0)
    (grad,) = torch.autograd.grad(loss, [other])
    torch.testing.assert_close(grad, expected(batch(8), w.detach())[1])
    torch.testing.assert_close(w.grad, before)
    assert recordings.recorded == 2


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.empty(3, device="meta"), "an input is on meta, the loss on cpu"),
        (torch.ones(3).as_subclass(type("Wrapped", (torch.Tensor,), {})), "an input is a Wrapped"),
    ],
)
def test_what_cannot_be_recorded_is_told_once(trained, recordings, x, why):
    run, w, _, told = trained
    run._function = lambda x, w, factor: [w.sum()]
    for _ in range(4):
        run(x, w, 2.0)
    assert told == [f"CUDA graphs are not used: {why}"] and not recordings.recorded


def test_a_recording_that_fails_is_told_once(trained, monkeypatch):
    run, w, _, told = trained

    def captured(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "captured", captured)
    train(run, w, range(4))
    assert told == ["CUDA graphs are not used: recording failed: operation not permitted when stream is capturing"]


def test_a_graph_has_a_cublas_workspace_of_its_own(monkeypatch):
    """Inductor frees the one of the stream when it records; a graph that holds its address would read freed memory."""
    done = []

    class Graph:
        def __init__(self, *_, **__):
            pass

        def replay(self):
            pass

        def __enter__(self):
            done.append("begin")

        def __exit__(self, *_):
            done.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: done.append("clear"), raising=False)
    _, result = captured(lambda: done.append("record"), replay.Pool(), None)
    assert done == ["clear", "begin", "record", "end", "clear"] and result is None


def test_nothing_is_replayed_under_saved_tensors_hooks(trained, recordings):
    """A replay saves nothing, so a checkpoint could not recompute it."""
    run, w, function, told = trained
    train(run, w, range(3))
    replayed = recordings.replayed
    with torch.autograd.graph.save_on_cpu():
        train(run, w, range(2))
    assert (recordings.replayed, function.calls >= 2, told) == (replayed, True, [])
    train(run, w, range(2))
    assert recordings.replayed > replayed
