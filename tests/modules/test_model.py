from __future__ import annotations

import copy
import io

import models
import pytest
import torch
from modules import zoo
from reference import assert_same, backward, dense, hf_reference, reference

import cggr_compile
from cggr_compile import CGGRModel, CGGRScorer, TruncatedRouter, create_truncated_router

NAMES = [
    *("step", "token_ratio", "tokens_selected", "tokens_total", "router_tokens_selected"),
    *("avg_confidence", "avg_entropy", "avg_difficulty", "selection", "scoring"),
]


def make(name="llama", layers=1, options=None, **arguments):
    model = zoo.style(name, layers=2)
    options = {"compiler": "eager", "fallback": "error", "launch_bound": "select", **(options or {})}
    return CGGRModel(
        model,
        TruncatedRouter(model, layers),
        **{"warmup_steps": 0, "dynamic_threshold": False, "options": options, **arguments},
    )


def test_trains_the_selected_tokens_of_the_model():
    wrapped = make()
    batch = models.make_batch()
    out = wrapped(**batch)
    assert type(out).__name__ == "CausalLMOutputWithPast"
    got = backward(wrapped.model, out.loss)
    selected = cggr_compile.runtime(wrapped.model).selected
    assert_same(got, hf_reference(wrapped.model, batch, selected))
    with pytest.raises(AssertionError):  # the control
        assert_same(got, dense(wrapped.model, batch))


def test_metrics():
    wrapped = make()
    batch = models.make_batch()
    wrapped(**batch)
    wrapped.step()
    metrics = wrapped.get_metrics()
    assert set(NAMES) <= set(metrics) and metrics["matched"]
    assert metrics["step"] == 1
    assert metrics["tokens_selected"] == metrics["router_tokens_selected"] == 8
    assert metrics["tokens_total"] == int((batch["labels"][:, 1:] != -100).sum())
    assert (metrics["selection"], metrics["scoring"]) == ("topk", "combined")
    assert 0 < metrics["avg_confidence"] < 1 and metrics["avg_entropy"] > 0


@pytest.mark.parametrize("gradient", [pytest.param("exact", marks=pytest.mark.slow), "routed"])
def test_masked_language_model(gradient):
    wrapped = make("bert", options={"gradient": gradient, "kv_gradient": "stop"})
    ids = zoo.ids()
    labels = torch.where(ids % 3 == 0, -100, ids)
    got = backward(wrapped.model, wrapped(ids, labels=labels).loss)
    selected = cggr_compile.runtime(wrapped.model).selected
    arguments = {"gradient": gradient, "kv_gradient": "stop"}
    want = reference(wrapped.model, lambda: wrapped.model(ids).logits, labels, selected, **arguments)
    assert wrapped.get_metrics()["tokens_selected"] == 6
    assert_same(got, want)


def test_the_backend_scores_as_the_router_does():
    wrapped = make(options={"router_precision": "model"})
    ids = zoo.ids()
    wrapped(ids, labels=ids)
    scorer = CGGRScorer(TruncatedRouter(wrapped.model, 1))
    scorer(ids, targets=ids)
    inside, outside = wrapped.get_metrics(), scorer.get_metrics()
    for figure in ("tokens_total", "avg_confidence", "avg_entropy", "avg_difficulty"):
        assert inside[figure] == pytest.approx(outside[figure], rel=1e-4), figure


def test_settings_reach_the_backend():
    wrapped = make(min_tokens_ratio=0.5, scoring="margin", selection="fixed_quota", options={"kv_gradient": "stop"})
    wrapped(**models.make_batch())
    options = cggr_compile.runtime(wrapped.model).options
    assert (options.min_tokens_ratio, options.scoring, options.selection) == (0.5, "margin", "fixed_quota")
    assert (options.router_layers, options.kv_gradient, options.advance) == (1, "stop", "manual")
    assert wrapped.get_metrics()["tokens_selected"] == 16


def test_routers():
    model = zoo.style("llama", layers=2)
    assert CGGRModel(model).options["router_layers"] == "full"
    assert CGGRModel(model, create_truncated_router(model)).options["router_layers"] == "full"  # both of two blocks
    assert CGGRModel(model, create_truncated_router(model, 1)).options["router_layers"] == 1
    for router in (zoo.style("llama"), TruncatedRouter(zoo.style("llama"))):
        with pytest.raises(ValueError, match="router must be None or a TruncatedRouter of the same model"):
            CGGRModel(model, router)


def test_ratio_one_is_the_model():
    wrapped = make(min_tokens_ratio=1.0)
    batch = models.make_batch()
    assert_same(backward(wrapped.model, wrapped(**batch).loss), dense(wrapped.model, batch))


def test_everything_but_training_is_the_models_own():
    wrapped = make()
    model, batch = wrapped.model, models.make_batch()

    def own(**arguments):
        with torch.no_grad():
            return model(batch["input_ids"], **arguments)

    assert torch.equal(wrapped(batch["input_ids"]).logits, own().logits)
    with torch.no_grad():
        assert torch.equal(wrapped(**batch).loss, own(labels=batch["labels"]).loss)
    wrapped.eval()
    out = wrapped(**batch)
    assert torch.equal(out.logits, own().logits) and torch.equal(out.loss, own(labels=batch["labels"]).loss)
    prompt = batch["input_ids"][:, :4]
    expected = copy.deepcopy(model).generate(prompt, max_new_tokens=3, do_sample=False)
    wrapped.train()
    wrapped(**batch).loss.backward()
    wrapped.eval()
    assert torch.equal(model.generate(prompt, max_new_tokens=3, do_sample=False), expected)
    assert cggr_compile.runtime(model).metrics()["matched"] and len(cggr_compile.runtime(model).reports) == 1


def test_checkpoints_hold_every_tensor_once():
    wrapped = make()
    wrapped(**models.make_batch()).loss.backward()
    keys = set(wrapped.state_dict())
    assert keys == {"step_count", *(f"model.{name}" for name in wrapped.model.state_dict())}
    assert not [key for key in keys if "_orig_mod" in key or "router" in key]


def test_resumes_at_the_step():
    wrapped = make(options={"seed": 3})
    batch = models.make_batch()
    for _ in range(3):
        wrapped(**batch)
        wrapped.step()
    for compiled_before in (False, True):
        other = make(options={"seed": 3})
        if compiled_before:
            other(**batch)
        other.load_state_dict(wrapped.state_dict())
        rt = cggr_compile.runtime(other.model)
        assert (int(other.step_count), rt.metrics()["step"], rt.seed) == (3, 3, 3)
    twin = copy.deepcopy(wrapped)  # a copy has a runtime of its own
    assert_same(backward(twin.model, twin(**batch).loss), backward(wrapped.model, wrapped(**batch).loss))
    assert twin.get_metrics()["step"] == 3


def test_two_models_of_one_class_keep_apart():
    first, second = make(), make()
    batch, other = models.make_batch(), models.make_batch(ignored=False)
    first(**batch)
    first.step()
    second(**other)
    assert [m.get_metrics()["step"] for m in (first, second)] == [1, 0]
    assert [m.get_metrics()["tokens_total"] for m in (first, second)] == [26, 30]


def test_can_be_stored_whole():
    wrapped = make()
    batch = models.make_batch()
    want = backward(wrapped.model, wrapped(**batch).loss)
    file = io.BytesIO()
    torch.save(wrapped, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_same(backward(loaded.model, loaded(**batch).loss), want)


def test_a_compilation_around_it_does_not_take_the_backend_away():
    wrapped = make()
    batch = models.make_batch()
    want = wrapped(**batch).loss
    torch._dynamo.reset()
    got = torch.compile(lambda **batch: wrapped(**batch).loss * 1.0, backend="eager")(**batch)
    torch.testing.assert_close(got, want)
    assert wrapped.get_metrics()["matched"]


def test_bad_arguments():
    model = zoo.style("llama", layers=2)
    with pytest.raises(ValueError, match=r"input_ids must have shape \[B, S\]"):
        make()(zoo.ids()[0])
    with pytest.raises(ValueError, match="labels must match input_ids"):
        make()(zoo.ids(), labels=zoo.ids()[:, 1:])
    with pytest.raises(ValueError, match=r"options must leave out \['min_tokens_ratio'\]"):
        CGGRModel(model, options={"min_tokens_ratio": 0.5})
    with pytest.raises(ValueError, match="unknown option 'kv_gradiend'"):
        CGGRModel(model, options={"kv_gradiend": "stop"})
    with pytest.raises(ValueError, match="model must be a module"):
        CGGRModel(lambda input_ids: input_ids)
