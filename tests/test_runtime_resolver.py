"""Models of one class share Dynamo's graph; steps, metrics and schedules are each model's own.

Where whose call it is matters alone, a backend that does nothing but ask keeps the compilations short.
"""

from __future__ import annotations

import functools
import gc
import threading
import weakref

import models
import pytest
import torch
from models import family
from torch import nn

import cggr_compile
from cggr_compile.runtime_resolver import RuntimeResolver

OPTIONS = {"compiler": "eager", "scoring": "random", "min_tokens_ratio": 0.5}


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()


def compiled(**options):
    model = family("llama", num_hidden_layers=1).train()
    model.compile(backend="cggr", options=OPTIONS | options)
    return model


def train(model, ids, steps=1):
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()


def test_the_second_model_of_a_sweep_has_its_own_runtime():
    ids = torch.randint(0, 50, (2, 16))
    first, second = compiled(), compiled()
    train(first, ids, 3)
    with torch.compiler.set_stance("fail_on_recompile"):  # otherwise this test would show nothing
        train(second, ids, 2)
        train(first, ids)
    runtimes = [cggr_compile.runtime(model) for model in (first, second)]
    assert [runtime.metrics()["step"] for runtime in runtimes] == [4, 2]
    for runtime in runtimes:
        assert runtime.metrics()["matched"] and runtime.selected is not None and len(runtime.reports) == 1
    assert runtimes[0].options == runtimes[1].options


@pytest.mark.slow
def test_the_second_model_begins_its_curriculum_anew():
    ids = torch.randint(0, 50, (2, 16))
    first, second = compiled(warmup_steps=4), compiled(warmup_steps=4)
    train(first, ids, 6)
    train(second, ids)
    assert cggr_compile.runtime(first).metrics()["ratio"] == 0.5
    assert cggr_compile.runtime(second).metrics()["ratio"] == 1.0


def test_equal_selections_from_equal_steps():
    ids = torch.randint(0, 50, (2, 16))
    selected = []
    for _ in range(2):
        model = compiled()
        train(model, ids, 2)
        selected.append(cggr_compile.runtime(model).selected)
    assert torch.equal(*selected)


def asking(gm, inputs):
    """A backend that counts steps."""
    resolver = RuntimeResolver(gm, inputs)

    resolver.end_capture()

    def run(*args):
        resolver.begin_call(args).advance()
        try:
            return gm.forward(*args)
        finally:
            resolver.end_call()

    return run


class Inner(nn.Module):
    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.shared, self.own = shared, nn.Linear(2, 2)

    def forward(self, x):
        return self.own(self.shared(x)).sum()


class Model(nn.Module):
    """``hidden``: keep the inner module where it is no part of the module tree. ``breaks``: the graph breaks in it."""

    def __init__(self, shared: nn.Linear, hidden: bool = False, breaks: bool = False) -> None:
        super().__init__()
        inner = Inner(shared)
        self.kept = [inner] if hidden else nn.ModuleList([inner])
        self.breaks = breaks

    def forward(self, x):
        y = self.kept[0](x)
        if self.breaks:
            torch._dynamo.graph_break()
        return y + self.kept[0](x)


class Decorated(Model):
    @torch.compile(backend=asking)
    def forward(self, x):
        return super().forward(x)


class Trainer:
    def __init__(self, model) -> None:
        self.model = model

    def step(self, x):
        return self.model(x)


def call_model(model, x):
    return model(x)


compile_it = functools.partial(torch.compile, backend=asking)


def in_place(model):
    model.compile(backend=asking)
    return model


def in_a_dict(model):
    step = compile_it(lambda batch: batch["models"]["policy"](batch["x"]))
    return lambda x: step({"models": {"policy": model}, "x": x})


def in_a_closure(model):
    return compile_it(lambda x: model(x))


def as_a_global(model):
    step = compile_it(lambda x: GLOBAL(x))

    def call(x):
        global GLOBAL
        GLOBAL = model
        return step(x)

    return call


shared_step = compile_it(call_model)
WAYS = {
    "in place": in_place,
    "torch.compile": compile_it,
    "of the result": lambda model: compile_it(compile_it(model)),
    "its forward": lambda model: compile_it(model.forward),
    "a method": lambda model: compile_it(Trainer(model).step),
    "one function": lambda model: functools.partial(shared_step, model),
    "a partial": lambda model: compile_it(functools.partial(call_model, model)),
    "the result, to a function": lambda model: functools.partial(shared_step, compile_it(model)),
    "dict": in_a_dict,
    "closure": in_a_closure,
    "global": as_a_global,
    "wrapped": lambda model: compile_it(nn.Sequential(model)),
}


def tiny():
    model = models.SlicedLoss()
    del model.blocks[2:]
    return model


def counts(*of):
    return [cggr_compile.runtime(model).metrics()["step"] for model in of]


@pytest.mark.parametrize("way", WAYS)
def test_every_call_is_for_the_model_that_makes_it(way):
    shared, x = nn.Linear(2, 2), torch.ones(1, 2)
    several = [Model(shared) for _ in range(3)]
    asked = [cggr_compile.runtime(model) for model in several]
    calls = [WAYS[way](model) for model in several]
    for i in (0, 1, 1, 2, 0, 2, 2):
        calls[i](x)
    assert counts(*several) == [2, 2, 3]
    assert [cggr_compile.runtime(model) for model in several] == asked
    assert counts(*(model.kept[0] for model in several)) == [2, 2, 3]


def test_a_class_whose_forward_is_compiled():
    several = [Decorated(nn.Linear(2, 2)) for _ in range(2)]
    for i in (0, 1, 1):
        several[i](torch.ones(1, 2))
    assert counts(*several) == [1, 2]


@pytest.mark.parametrize("way", ["in place", "one function"])
def test_modules_outside_of_the_tree(way):
    shared = nn.Linear(2, 2)
    several = [Model(shared, hidden=True) for _ in range(2)]
    calls = [WAYS[way](model) for model in several]
    for i in (0, 1, 1):
        calls[i](torch.ones(1, 2))
    assert counts(*(model.kept[0] for model in several)) == [1, 2] == counts(*several)


@pytest.mark.parametrize("way", ["in place", "one function"])
def test_the_pieces_of_a_broken_graph_belong_to_the_whole_model(way):
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    several = [Outer(Model(nn.Linear(2, 2), breaks=True)) for _ in range(2)]
    calls = [WAYS[way](model) for model in several]
    for i in (0, 1, 1):
        calls[i](torch.ones(1, 2))
    # two pieces: the one before the break and the one behind it
    assert counts(*several) == [2, 4] == counts(*(model.inner.kept[0] for model in several))


def test_the_trained_one_of_two_models():
    reference, policies = Model(nn.Linear(2, 2)), [Model(nn.Linear(2, 2)) for _ in range(2)]
    reference.requires_grad_(False)
    step = compile_it(lambda reference, policy, x: reference(x) + policy(x))
    for i in (0, 1, 1):
        step(reference, policies[i], torch.ones(1, 2))
    assert counts(*policies) == [1, 2]


def test_pieces_without_sources():
    """As DDPOptimizer cuts them."""

    def backend(gm, inputs):
        for node in gm.graph.find_nodes(op="placeholder"):
            del node._dynamo_source
        return asking(gm, inputs)

    step = torch.compile(call_model, backend=backend)
    several = [Model(nn.Linear(2, 2)) for _ in range(2)]
    for i in (0, 1, 1):
        step(several[i], torch.ones(1, 2))
    assert counts(*several) == [1, 2]


def test_functional_models():
    template = Model(nn.Linear(2, 2))
    step = compile_it(lambda parameters, x: torch.func.functional_call(template, parameters, x))
    several = [{name: nn.Parameter(p.detach().clone()) for name, p in template.named_parameters()} for _ in range(2)]
    several[1]["kept.0.shared.weight"] = several[0]["kept.0.shared.weight"]
    for i in (0, 1, 1):
        step(several[i], torch.ones(1, 2))
    assert counts(*several) == [1, 2]
    torch._dynamo.reset()
    factor = torch.ones((), requires_grad=True)
    fresh = [{name: p.detach() * factor for name, p in template.named_parameters()} for _ in range(3)]
    for tensors in fresh:  # no Parameters: other tensors in every step
        step(tensors, torch.ones(1, 2))
    assert counts(fresh[0]) == [3]


def test_the_model_may_be_compiled_or_not():
    model, x = in_place(Model(nn.Linear(2, 2))), torch.ones(1, 2)
    compiled_call = model._compiled_call_impl
    for call in (None, compiled_call, None, compiled_call):
        model._compiled_call_impl = call
        model(x)
    compile_it(model)(x)
    with torch.no_grad():
        model(x)
    assert counts(model) == [4]


def test_threads_do_not_mix():
    several, x = [in_place(Model(nn.Linear(2, 2))) for _ in range(2)], torch.ones(1, 2)
    for model in several:
        model(x)
    threads = [threading.Thread(target=lambda m=m: [m(x) for _ in range(20)]) for m in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts(*several) == [21, 21]


@pytest.mark.parametrize("options", [{}, {"warmup_steps": 2}], ids=["one ratio", "ladder"])
def test_compiled_graphs_keep_no_model_and_no_runtime(options):
    ids = torch.randint(0, 50, (2, 16))
    model, other = (models.compiled(tiny(), **options) for _ in range(2))
    for each in (model, other, model):
        each(ids, ids).backward()
    alive = [weakref.ref(cggr_compile.runtime(model)), weakref.ref(model), weakref.ref(model.lm_head.weight)]
    del model, each
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
    other(ids, ids)
    assert counts(other) == [2]


def test_gradients_of_the_inputs_alone():
    """A frozen model is a model."""
    model = tiny().requires_grad_(False)

    class FromEmbeddings(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, labels):
            for block in model.blocks:
                x = block(x)
            logits = model.lm_head(model.ln_f(x))[:, :-1]
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    whole = models.compiled(FromEmbeddings(), advance="manual", scoring="random", selection="random")
    runtime, ids, chosen = cggr_compile.runtime(whole), torch.randint(0, 50, (2, 16)), []
    for _ in range(2):
        whole(model.wte(ids).detach().requires_grad_(), ids).backward()
        chosen.append(runtime.selected.clone())
        runtime.step()
    assert runtime.metrics()["matched"] and not torch.equal(*chosen)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp outside", "ddp inside", "fully_shard"])
def test_distributed_wrappers(one_process, how):
    ids = torch.randint(0, 50, (2, 16))
    model = tiny()
    runtime = cggr_compile.runtime(model)
    if how == "ddp outside":
        whole = nn.parallel.DistributedDataParallel(models.compiled(model))
    elif how == "ddp inside":
        whole = models.compiled(nn.parallel.DistributedDataParallel(model))
    else:
        whole = models.compiled(model)
        whole(ids, ids).backward()
        whole.zero_grad()
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    whole(ids, ids).backward()
    assert cggr_compile.runtime(whole) is cggr_compile.runtime(model) is runtime
    assert runtime.metrics()["matched"] and counts(whole) == [1 + (how == "fully_shard")]
