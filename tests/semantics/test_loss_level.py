"""The level ``loss``: without a stack of layers, head and loss run on the selected rows and all below is exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import token_losses
import torch
import torch.nn.functional as F
from models import HIDDEN, VOCAB, compiled, make_batch, slow_but
from reference import Run, assert_same, backward, dense, eager_call, reference, shift, worst
from stackless import OF_VALUES, SEQ, STACKLESS, Convolution, Mixed, logits_of, make
from token_losses import LOSSES, expected, open_gate, outside, picks_of
from torch import Tensor, nn
from training import complaints, metrics, picks

import cggr_compile
from cggr_compile.causes import Cause

RATIO = 0.5


@pytest.fixture(autouse=True)
def recurrent_layers() -> Iterator[None]:
    with torch._dynamo.config.patch(allow_rnn=True):  # without, Dynamo breaks the graph in front of an nn.GRU
        yield


def step(name: str, **options: Any) -> tuple[nn.Module, dict[str, Tensor], Tensor, Run]:
    """A compiled model after a step, its batch, the targets, and what it computed."""
    model, batch, target = make(name)
    compiled(model, **{"min_tokens_ratio": RATIO, "selection": "importance", **options})
    got = backward(model, model(**batch).loss)
    assert metrics(model)["level"] == "loss", metrics(model)
    return model, batch, target, got


def of_selected(model: nn.Module, batch: dict[str, Tensor], target: Tensor, exact_loss: bool = False) -> Run:
    """What the recorded selection has to give: the exact gradient of its weighted loss."""
    run = reference(model, lambda: logits_of(model, batch), target, picks(model), gradient="exact")
    return Run(eager_call(model, **batch).loss.detach(), run.grads) if exact_loss else run


def check_gradients(name: str) -> None:
    model, batch, target, got = step(name)
    want = of_selected(model, batch, target, name in OF_VALUES)
    assert_same(got, want)
    assert worst(got, dense(model, batch))[0] > 1e-2  # the check can fail


def test_state_space_model() -> None:
    check_gradients("mamba")


def test_masked_language_model() -> None:
    check_gradients("deberta-v2")


def test_encoder_decoder() -> None:
    check_gradients("t5")


@pytest.mark.parametrize("name", slow_but(["convolution"], sorted({*STACKLESS} - {"mamba", "deberta-v2", "t5"})))
def test_other_models(name: str) -> None:
    check_gradients(name)


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing to score": {"scoring": "random", "selection": "random"},
    "hardest": {"selection": "topk", "scoring": "loss"},
    "fused": {"cross_entropy": "fused"},
    "no rows in the backward": {"row_sparse": False},
    "of layers, without meaning": {"router_layers": 7, "gradient": "routed", "kv_gradient": "stop", "context": 4},
    "whole batch": {"scope": "batch"},
    "no router": {"disable_passes": ["insert_router"]},
}


@pytest.mark.parametrize("name", slow_but(["of layers, without meaning", "hardest"], OPTIONS))
def test_options(name: str) -> None:
    model, batch, target, got = step("convolution", **OPTIONS[name])
    assert_same(got, of_selected(model, batch, target))
    assert metrics(model)["gradient_tokens"] is None
    said = cggr_compile.runtime(model).reports[0].record("trained_inputs").reason
    without_meaning = "gradient='routed', kv_gradient='stop', context=4, router_layers=7 mean nothing here"
    assert (without_meaning in said) == (name == "of layers, without meaning"), said


def test_hardest_are_those_of_the_whole_model() -> None:
    """The router reads the final hidden states: its scores are the true losses."""
    model, batch, target, _ = step("convolution", selection="topk", scoring="loss", router_precision="model")
    losses = F.cross_entropy(logits_of(model, batch).transpose(1, 2), target, reduction="none")
    losses = losses.masked_fill(target == -100, -1.0)
    for row, chosen in zip(losses, picks(model).rows, strict=True):
        kept = chosen[chosen >= 0]
        assert row[kept].min() >= row[[i for i in range(SEQ) if i not in kept.tolist()]].max()


def test_ratio_of_one_evaluation_and_verify() -> None:
    model, batch, target, got = step("convolution", verify=True)
    assert_same(got, of_selected(model, batch, target))
    (report,) = cggr_compile.runtime(model).reports
    assert report.gradient == "exact" and report.verification is not None and not report.verification.note
    assert report.verification.captured_error is not None and report.verification.captured_error < 1e-5
    model.eval()
    assert torch.allclose(model(**batch).loss, eager_call(model, **batch).loss)
    assert not cggr_compile.runtime(model).reports[-1].training
    whole = compiled(make("convolution")[0], min_tokens_ratio=1.0)
    assert_same(backward(whole, whole(**batch).loss), dense(whole, batch))
    assert metrics(whole)["level"] == "dense" and "1.0" in metrics(whole)["fallback_reason"]


def test_the_ladder_of_ratios() -> None:
    """Every ratio of a schedule is at this level, but for 1.0; a step is one step."""
    model, batch, target = make("convolution")
    compiled(model, min_tokens_ratio=0.25, warmup_steps=2, ladder=[0.5], selection="importance")
    ratios = []
    for _ in range(3):
        got, figures = backward(model, model(**batch).loss), metrics(model)
        ratios.append((figures["ratio"], figures["level"]))
        assert_same(got, of_selected(model, batch, target) if figures["ratio"] < 1 else dense(model, batch))
    assert ratios == [(1.0, "dense"), (1.0, "dense"), (0.25, "loss")], ratios


@pytest.mark.slow
def test_the_threshold_follows_the_router() -> None:
    model, batch, _ = make("convolution")
    compiled(model, min_tokens_ratio=0.5, dynamic_threshold=True, warmup_steps=1)
    for _ in range(3):
        model(**batch).loss.backward()
    assert metrics(model)["level"] == "loss" and metrics(model)["avg_confidence"] is not None


def test_few_labels_need_no_router_and_lose_nothing() -> None:
    """Masked tokens: every label finds a slot, so the gradient is the dense one."""
    model, batch, _ = make("denoising convolution")
    batch["labels"][:, 2:] = -100
    compiled(model)
    with complaints() as heard:
        got = backward(model, model(**batch).loss)
    assert_same(got, dense(model, batch))
    figures = metrics(model)
    assert (figures["level"], figures["selection"], figures["labels_overflow"]) == ("loss", "labels", 0), figures
    assert any("'labels' here: " in text and "slots carry loss" in text for text in heard), heard
    assert not cggr_compile.runtime(model).reports[0].record("insert_router").matched


class Gated(Mixed):
    """Its MLP splits one product, and routes: several values come out of one call."""

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        x = x + self.mixer(self.ln_1(x))
        gate, up = self.up(self.ln_2(x)).chunk(2, dim=-1)
        weights, _ = torch.topk(torch.softmax(gate, -1), 2)
        return self.ln_f(x + self.down(torch.cat([F.silu(gate) * up, gate], -1)) * weights.sum(-1, keepdim=True))


def test_a_tail_whose_calls_give_several_values() -> None:
    model, batch = Gated(Convolution()), make_batch(seq=SEQ)
    compiled(model, min_tokens_ratio=RATIO)
    got = backward(model, model(**batch).loss)
    assert metrics(model)["level"] == "loss"
    assert_same(got, of_selected(model, batch, shift(batch["labels"])))


class Preference(Mixed):
    def __init__(self) -> None:
        super().__init__(Convolution())


@pytest.mark.parametrize("loss", slow_but(["preference"], ["preference", "weighted_tokens", "distillation"]))
def test_per_token_values(loss: str) -> None:
    """Exact values at every position, and the gradient of the selected rows."""
    model = Preference()

    def value(gate: Any) -> Any:
        return LOSSES[loss](gate(model.lm_head(model.hidden(token_losses.IDS))))

    run = compiled(lambda: value(open_gate), min_tokens_ratio=RATIO)
    got = backward(model, outside(run()))
    assert metrics(model)["level"] == "loss"
    assert_same(got, expected(model, value, picks_of(model), "exact"))
    assert_same(Run(got.loss, {}), Run(backward(model, outside(value(open_gate))).loss, {}))


def test_diffusion() -> None:
    """A denoiser of masked tokens, whose loss weighs each sequence by its noise."""
    model, ids = Mixed(Convolution(causal=False), causal=False), make_batch(seq=SEQ)["input_ids"]
    noise = torch.tensor([[0.5], [0.8]])
    hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < noise

    def loss(gate: Any, ids: Tensor) -> Tensor:
        logits = gate(model(torch.where(hidden, 0, ids)).logits)
        each = F.cross_entropy(logits.reshape(-1, VOCAB), ids.reshape(-1), reduction="none").view(ids.shape)
        return (each * hidden / noise).sum() / ids.numel()

    got = backward(model, compiled(lambda ids: loss(open_gate, ids), min_tokens_ratio=RATIO)(ids))
    assert metrics(model)["level"] == "loss"
    chosen = picks(model)
    assert all(hidden[row, at] for row in range(2) for at in chosen.rows[row].tolist() if at >= 0)
    factor = torch.zeros(2, SEQ + 1).scatter(1, torch.where(chosen.rows < 0, SEQ, chosen.rows), chosen.weights)
    gate = lambda z: z.detach() + (z - z.detach()) * factor[:, :SEQ, None]  # noqa: E731
    assert_same(got, backward(model, loss(gate, ids)))


def test_states_from_outside() -> None:
    """A piece of a model, head and loss alone: what comes from the layers gets its gradient."""
    head, hidden = nn.Linear(HIDDEN, VOCAB), torch.randn(2, SEQ, HIDDEN, requires_grad=True)
    labels = make_batch(seq=SEQ)["labels"]

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).view(-1, VOCAB), labels.view(-1))

    run = compiled(loss, min_tokens_ratio=RATIO, selection="random", scoring="random")
    got = backward(head, run(hidden, labels))
    below, hidden.grad = hidden.grad, None
    assert metrics(head)["level"] == "loss"
    assert_same(got, reference(head, lambda: head(hidden), labels, picks(head), gradient="exact"))
    torch.testing.assert_close(below, hidden.grad)


def test_a_gate_in_a_piece_of_a_model_is_no_head() -> None:
    """What it computes leaves the graph as the values of a head would."""
    gate, hidden = nn.Linear(HIDDEN, 4), torch.randn(2, SEQ, HIDDEN, requires_grad=True)

    def routing(hidden: Tensor) -> Tensor:
        return torch.topk(torch.softmax(gate(hidden), -1), 2).values

    run = compiled(routing, min_tokens_ratio=RATIO, fallback="silent")
    weight = torch.randn(2, SEQ, 2)
    got = backward(gate, (run(hidden) * weight).sum())
    assert metrics(gate)["level"] == "dense"
    assert_same(got, backward(gate, (routing(hidden) * weight).sum()))


def test_the_level_is_told() -> None:
    model, batch, _ = make("convolution")
    compiled(model, min_tokens_ratio=RATIO, fallback="warn")
    with complaints() as heard:
        for _ in range(2):
            model(**batch).loss.backward()
    (told,) = [text for text in heard if "this training graph" in text]
    why = "no attention over the sequence between embedding and head"
    assert "head and loss of the selected positions" in told and why in told and "supported are" in told
    assert why in metrics(model)["fallback_reason"] and metrics(model)["matched"]
    found = cggr_compile.explain(model, **batch)
    assert (found.level, found.matched, found.cause) == ("loss", True, Cause.UNSUPPORTED_STACK)
    assert why in found.obstacle and "hidden states" in found.reason and "level: loss" in str(found)
    assert cggr_compile.runtime(model).reports[0].as_dict()["level"] == "loss"


def test_a_graph_break_in_front_of_the_head_is_its_cause() -> None:
    """The piece with head and loss is at this level; what cut it off from its layers is named."""
    model, batch, target = make("convolution")
    model.ln_f.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    compiled(model, min_tokens_ratio=RATIO, fallback="warn", selection="importance", warmup_steps=1, ladder=[0.5])
    for _ in range(2):
        got = backward(model, model(**batch).loss)
    figures = metrics(model)
    assert figures["level"] == "loss" and figures["step"] == 2, figures
    assert "a graph break at" in figures["fallback_reason"], figures
    assert_same(got, of_selected(model, batch, target))
