"""Which forward a call repeats. A backend that does nothing but ask keeps the compilations short."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import cggr_compile
from cggr_compile import recompute
from cggr_compile.options import Options
from cggr_compile.runtime_resolver import RuntimeResolver

CPU = torch.device("cpu")


class Model(nn.Module):
    """Saves a tensor; what it is called with names the call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sin().sum()


@pytest.fixture
def calls():
    """What the calls of compiled models saw: (name, step, whether it repeats)."""
    return []


@pytest.fixture
def model(calls):
    return make(calls)


def make(calls):
    def backend(gm, inputs):
        resolver = RuntimeResolver(gm, inputs)
        resolver.end_capture()

        def run(*args):
            call = resolver.begin_call(args)
            resolver.end_call()
            if call.runtime.options.min_tokens_ratio == 1.0:  # a graph without a selection needs none
                return gm.forward(*args)
            call.ratio(Options(warmup_steps=4))
            (x,) = (arg for arg in args if not isinstance(arg, nn.Parameter))
            calls.append((int(x.flatten()[0]), int(call.state(CPU)[1]), call.repeats))
            return gm.forward(*args)

        return run

    model = Model()
    model.compile(backend=backend)
    return model


def named(name: int) -> torch.Tensor:
    return torch.full((2,), float(name))


def around(*functions, start=None):
    """One checkpoint around the calls of some functions; the sum of what they return."""
    start = torch.zeros((), requires_grad=True) if start is None else start * 1.0

    def body(start):
        return sum(function() for function in functions) + 0 * start

    return checkpoint(body, start, use_reentrant=False)


def steps(model) -> int:
    return cggr_compile.runtime(model).metrics()["step"]


def assert_repeated(calls, new, repeated) -> None:
    """Names of the calls that were new, in order, and of those that repeated one and saw its step."""
    first = {name: step for name, step, repeats in calls if not repeats}
    assert [name for name, _, repeats in calls if not repeats] == new
    assert sorted(name for name, _, repeats in calls if repeats) == sorted(repeated)
    assert all(step == first[name] for name, step, _ in calls)


@pytest.mark.parametrize("warm", [False, True])
def test_a_recomputation_takes_the_step_of_its_forward(model, calls, warm):
    if warm:
        model(named(9))
    loss = around(lambda: model(named(1)))
    model(named(2))
    loss.backward()
    assert_repeated(calls, [9] * warm + [1, 2], [1])
    assert steps(model) == 2 + warm


def test_two_checkpoints_alive_at_once(model, calls):
    losses = [around(lambda i=i: model(named(i))) for i in range(3)]
    for i in (1, 0, 2):
        losses[i].backward()
    assert_repeated(calls, [0, 1, 2], [0, 1, 2])


def test_several_calls_in_one_checkpoint(model, calls):
    other = make(calls)
    loss = around(lambda: model(named(1)), lambda: other(named(2)), lambda: model(named(3)))
    other(named(4))
    loss.backward()
    assert_repeated([call for call in calls if call[0] in (1, 3)], [1, 3], [1, 3])
    assert_repeated([call for call in calls if call[0] in (2, 4)], [2, 4], [2])
    assert (steps(model), steps(other)) == (2, 2)


@pytest.mark.parametrize("early_stop", [True, False])
def test_nested_checkpoints(model, calls, early_stop):
    def outer(start):
        inner = around(lambda: model(named(2)), start=start)
        return model(named(1)) + inner + model(named(3)) + 0 * start

    with set_checkpoint_early_stop(early_stop):
        loss = checkpoint(outer, torch.zeros((), requires_grad=True), use_reentrant=False)
    model(named(4))
    loss.backward()
    seen = {(name, step) for name, step, _ in calls}
    assert seen == {(2, 0), (1, 1), (3, 2), (4, 3)} and steps(model) == 4
    assert {name for name, _, repeats in calls if repeats} == {1, 2, 3}


def test_a_backward_inside_a_checkpoint(model, calls):
    def body(start):
        inner = around(lambda: model(named(1)), start=start)
        (grad,) = torch.autograd.grad(inner, [model.weight])
        return model(named(2)) + 0 * grad.sum() + 0 * start

    loss = checkpoint(body, torch.zeros((), requires_grad=True), use_reentrant=False)
    model(named(3))
    loss.backward()
    assert {(name, step) for name, step, _ in calls} == {(1, 0), (2, 1), (3, 2)} and steps(model) == 3


def test_every_backward_recomputes_anew(model, calls):
    loss = around(lambda: model(named(1)), lambda: model(named(2)))
    loss.backward(retain_graph=True)
    loss.backward()
    assert_repeated(calls, [1, 2], [1, 1, 2, 2])


def test_hooks_of_others_do_not_hide_a_checkpoint(model, calls):
    def offloaded():
        with torch.autograd.graph.save_on_cpu():
            return model(named(1))

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        loss = around(offloaded, lambda: model(named(2)))
    model(named(3))
    loss.backward()
    assert_repeated(calls, [1, 2, 3], [1, 2])


def test_nothing_is_kept(model):
    with pytest.raises(KeyError):
        around(lambda: model(named(1)), {}.popitem)
    around(lambda: model(named(2))).backward()
    around(lambda: model(named(3)))  # never differentiated
    gc.collect()
    assert len(recompute._forwards) == 0 == len(recompute._repeated)


def test_recomputing_what_was_not_compiled(model, calls):
    model(named(1))
    with torch.compiler.set_stance("force_eager"):
        loss = around(lambda: model(named(2)))
    with pytest.raises(RuntimeError, match="its selection is not known"):
        loss.backward()
    assert steps(model) == 1
    cggr_compile.runtime(model).options = Options(min_tokens_ratio=1.0)
    with torch.compiler.set_stance("force_eager"):
        loss = around(lambda: model(named(2)))
    loss.backward()


def test_reentrant_checkpoints_count_once(model, calls):
    """Their first forward is without gradients; a backend's training graph runs in the backward pass only."""
    x = torch.zeros((), requires_grad=True)
    for _ in range(2):
        checkpoint(lambda x: model(named(1)) + 0 * x, x, use_reentrant=True).backward()
    assert [repeats for _, _, repeats in calls] == [False] * 4
