"""Sizes that change from call to call: one static graph for each, and a symbolic one when they are too many."""

from __future__ import annotations

import json
import logging
import math

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured
from reference import assert_same, backward, hf_reference, reference
from training import picks

import cggr_compile
from cggr_compile import compat
from cggr_compile.passes.semantic.make_sizes_static import MakeSizesStatic

SIZES = [(2, 16), (2, 24), (3, 40)]


class Step:
    """Model and loss, compiled; compares every call's gradients with the reference."""

    def __init__(self, **options) -> None:
        self.model = models.Decoder(layers=1)
        self.compiled = models.compiled(self.loss, **options)

    def loss(self, ids, labels):
        return F.cross_entropy(self.model(ids).flatten(0, 1), labels.flatten())

    def __call__(self, size, length) -> int:
        """The number of graphs compiled so far."""
        batch = models.make_batch(size, length)
        ids, labels = batch["input_ids"], batch["labels"]
        run = backward(self.model, self.compiled(ids, labels))
        chosen = picks(self.model)
        assert tuple(chosen.rows.shape) == (size, math.ceil(length / 4))
        assert_same(run, reference(self.model, lambda: self.model(ids), labels, chosen))
        return graphs()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def records(model):
    return {p.name: p for p in cggr_compile.runtime(model).reports[-1].passes}


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "checkpoints"])
def test_one_graph_for_each_size(checkpoints, tmp_path):
    model = models.family("llama", num_hidden_layers=1)
    model.config.use_cache = False  # transformers' warning about it would break the graph
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    models.compiled(model, dump_dir=str(tmp_path))

    def train(size, length):
        batch = models.make_batch(size, length)
        run = backward(model, model(**batch).loss)
        assert_same(run, hf_reference(model, batch, picks(model)))
        return graphs()

    for count, (size, length) in enumerate(SIZES):
        assert train(size, length) == count + 1
        assert records(model)["row_sparse"].matched
    with torch.no_grad():
        model.eval()(**models.make_batch(2, 12))
    model.train()
    assert [train(*size) for size in reversed(SIZES)] == [4, 4, 4], "only the evaluation was to be compiled"

    written = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("graph_01", "graph_02")]
    sizes = [next(p["details"]["sizes"] for p in one["passes"] if p["name"] == "make_sizes_static") for one in written]
    assert [list(one.values()) for one in sizes] == [[[2, 24]] * 2, [[3, 40]] * 2]


@pytest.mark.slow
def test_inductor():
    step = Step(compiler="inductor", scoring="random")
    assert [step(*size) for size in SIZES[:2]] == [1, 2]
    assert records(step.model)["row_sparse"].matched


@pytest.mark.slow
def test_too_many_sizes(caplog):
    """Near Dynamo's limit the last graph is symbolic, and there is room for one more: evaluation."""
    with torch._dynamo.config.patch(recompile_limit=4), caplog.at_level(logging.WARNING, "cggr_compile"):
        step = Step()
        assert [step(2, 16), step(2, 24)] == [1, 2]
        assert records(step.model)["row_sparse"].matched and "recompile_limit" not in caplog.text
        assert [step(2, length) for length in (12, 40, 20, 24)] == [3, 3, 3, 3]
        late = records(step.model)
        assert "limit is near" in late["make_sizes_static"].reason and not late["row_sparse"].matched
        assert caplog.text.count("recompile_limit") == 1
        with torch.no_grad():
            step.compiled(*models.make_batch(2, 36).values())
        assert graphs() == 4


def test_control_without_guards_a_graph_would_run_at_other_sizes(monkeypatch):
    monkeypatch.setattr(compat, "pin_size", lambda size: None)
    step = Step()
    with pytest.raises((AssertionError, RuntimeError)):
        for length in (16, 24, 40):
            step(2, length)


@pytest.mark.parametrize("why", ["mark_dynamic", "row_sparse=False"])
def test_sizes_that_stay_symbolic(why):
    step, batch = Step(row_sparse=why != "row_sparse=False"), models.make_batch()
    if why == "mark_dynamic":
        for tensor in batch.values():
            torch._dynamo.mark_dynamic(tensor, 1)
        backward(step.model, step.compiled(*batch.values()))  # Dynamo would raise if the size were pinned
        assert [step(2, 24), step(2, 40)] == [1, 1]
    else:
        assert [step(2, 16), step(2, 24), step(2, 40)] == [1, 2, 2]
    assert why in records(step.model)["make_sizes_static"].reason


@pytest.mark.slow
def test_numbers_are_not_pinned():
    """A count that differs at every call must not be compiled into the graph."""
    model = models.Decoder()

    def step(ids, labels, count):
        return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum") / count

    run = models.compiled(step)
    for length, count in [(16, 3), (24, 5), (40, 7), (20, 11)]:
        ids, labels = models.make_batch(2, length).values()
        got = backward(model, run(ids, labels, count))
        want = reference(model, lambda: model(ids), labels, picks(model), num_items=count)  # noqa: B023
        assert_same(got, want)
    assert "is no size" in records(model)["make_sizes_static"].reason
    assert graphs() <= 3


def test_autocast_inside_the_graph():
    """Sizes are propagated under the graph's own autocast, and the user's comes back."""
    model = models.Decoder()

    def step(ids, labels):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(ids).float().flatten(0, 1), labels.flatten())

    with torch._dynamo.config.patch(assume_static_by_default=False, specialize_float=True):
        one = Captured(step, *models.make_batch().values())
    assert one.run("make_sizes_static").matched and not torch.is_autocast_enabled("cpu")
    products = [node for node in one.gm.graph.nodes if "linear" in str(node.target)]
    assert products and all(node.meta["example_value"].dtype == torch.bfloat16 for node in products)


def test_the_graph_is_that_of_a_static_capture():
    model, batch = models.Decoder(), models.make_batch()

    def step(ids, labels):
        positions = torch.arange(ids.shape[1] * 2)[: ids.shape[1]]
        logits = model(ids) + positions.sum() / ids.numel()
        return F.cross_entropy(logits.view(-1, models.VOCAB), labels.view(ids.numel()))

    static = Captured(step, *batch.values())
    with torch._dynamo.config.patch(assume_static_by_default=False, specialize_float=True):
        torch._dynamo.reset()
        one = Captured(step, *batch.values())
    assert one.operators() != static.operators()
    assert one.run("make_sizes_static").matched and not static.run("make_sizes_static").matched
    one.gm.graph.eliminate_dead_code()
    assert one.operators() == static.operators()
    assert len(one.ctx.example_inputs) == len(one.gm.graph.find_nodes(op="placeholder"))
    for node in one.gm.graph.nodes:
        value = node.meta.get("example_value")
        assert not isinstance(value, torch.SymInt)
        assert not isinstance(value, torch.Tensor) or all(isinstance(size, int) for size in value.shape)
    one.check_shapes()
    assert not MakeSizesStatic()(one.gm, one.ctx).matched


def test_guards_of_the_compiler_reach_dynamo():
    from torch._guards import TracingContext, tracing

    outer = TracingContext(None)
    with tracing(outer), compat.tracing_under(compat.static_fake_mode()):
        TracingContext.get().guards_context.aotautograd_guards.append("guard")
    assert outer.guards_context.aotautograd_guards == ["guard"]
