"""Losses of per-token values: exact in the forward, and in the backward the gradient of the selected rows."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from models import HIDDEN, SEQ, VOCAB, compiled, slow_but
from reference import Run, assert_same, backward, hard_mask, routing
from token_losses import HEADS, IDS, LOSSES, Model, expected, factors, open_gate, outside, picks_of
from training import RATIO, metrics

import cggr_compile

QUICK_LOSSES = ("sequence_by_sequence", "entropy_in_pieces", "class_weights", "z_loss", "jensen_shannon", "preference")
QUICK_HEADS = ("chunked_values", "further_head", "against_a_reference", "head_without_logits")


def run(function: Any, **options: Any) -> Any:
    """A model, its gradients under the compiled step, and what they have to be."""
    model = Model()
    step = compiled(lambda: function(model, open_gate), **{"min_tokens_ratio": RATIO, "context": 0, **options})
    got = backward(model, outside(step()))
    assert metrics(model)["matched"], metrics(model)
    want = expected(model, lambda gate: function(model, gate), picks_of(model), options.get("gradient", "routed"))
    return model, got, want


def of_logits(name: str) -> Any:
    return lambda model, gate: LOSSES[name](gate(model(IDS)))


@pytest.mark.parametrize("name", slow_but(QUICK_LOSSES, LOSSES))
def test_losses(name: str) -> None:
    model, got, want = run(of_logits(name))
    assert_same(got, want)
    dense = backward(model, outside(LOSSES[name](model(IDS))))
    torch.testing.assert_close(got.loss, dense.loss, rtol=1e-5, atol=1e-6)  # every value is exact
    if name != "last_position":  # of which every position is selected
        assert (got.grads["lm_head.weight"] - dense.grads["lm_head.weight"]).norm() > 1e-3


@pytest.mark.parametrize("name", slow_but(QUICK_HEADS, HEADS))
def test_heads(name: str) -> None:
    model, got, want = run(HEADS[name])
    assert_same(got, want)
    torch.testing.assert_close(got.loss, backward(model, outside(HEADS[name](model, open_gate))).loss)


OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"gradient": "exact"},
    "topk": {"selection": "topk", "scoring": "loss"},
    "labels": {"selection": "labels", "max_selected": 4},
    "row_sparse off": {"row_sparse": False},
    "verified": {"verify": True},
    "inductor": {"compiler": "inductor"},
    "with logits": {"disable_passes": ["lower_values"]},
}


@pytest.mark.parametrize("name", slow_but(["exact", "labels", "verified"], OPTIONS))
def test_options(name: str) -> None:
    model, got, want = run(of_logits("clipped_policy"), **OPTIONS[name])
    assert_same(got, want)
    if name == "verified":
        report = cggr_compile.runtime(model).reports[-1]
        assert report.verification.captured_error < 1e-5 and not report.verification.note
    if name == "labels":
        assert metrics(model)["labels_overflow"] > 0


@pytest.mark.parametrize("context", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_adapter_of_the_head(context: int) -> None:
    """Dropout in front of it is drawn once, for the values and for their gradient."""
    model = Model()
    down, up = (torch.nn.Parameter(0.1 * torch.randn(*shape)) for shape in ((4, HIDDEN), (VOCAB, 4)))
    model.down, model.up = down, up

    def loss(gate: Any) -> torch.Tensor:
        hidden = model.hidden(IDS)
        # what F.dropout becomes under a compiler; eagerly it draws in another way
        dropped = F.dropout(hidden, 0.5) if gate is open_gate else 2 * hidden * (torch.rand_like(hidden) > 0.5)
        z = model.lm_head(hidden) + 2.0 * F.linear(F.linear(dropped, model.down), model.up)
        return F.cross_entropy(gate(z)[:, :-1].reshape(-1, VOCAB), IDS[:, 1:].reshape(-1))

    step = compiled(lambda: loss(open_gate), min_tokens_ratio=RATIO, context=context, gradient="routed")
    torch.manual_seed(5)
    got = backward(model, step())
    assert metrics(model)["level"] == "routed", metrics(model)
    torch.manual_seed(5)
    want = expected(model, loss, picks_of(model))
    if context:  # whose rows carry gradient through the layers as well
        names = ("down", "up", "lm_head.weight", "ln_f.weight")
        got, want = (Run(run.loss, {name: run.grads[name] for name in names}) for run in (got, want))
    assert_same(got, want)


@pytest.mark.parametrize("off", [(), ("lower_values",)])
def test_pieces_are_computed_once(off: Any) -> None:
    """The heads of four chunks are one product of the selected rows, or none: the values of the call are placed."""
    model, _, _ = run(HEADS["chunked_sums"], disable_passes=off)
    added = cggr_compile.runtime(model).reports[-1].record("rewrite_values").added
    kinds = ("linear", "cross", "token_log_probs", "place_token_values")
    found = [sum(n for name, n in added.items() if kind in name) for kind in kinds]
    assert found == ([1, 1, 0, 0] if off else [0, 0, 0, 1])


@pytest.mark.parametrize("off", [(), ("lower_values",)])
def test_no_logits_are_kept(off: Any) -> None:
    """What the backward pass reads has no axis over the vocabulary, unless the user's logits are computed."""
    model, kept = Model(), list[Any]()
    loss = LOSSES["clipped_policy"]
    step = compiled(lambda: loss(model(IDS)), min_tokens_ratio=RATIO, disable_passes=off)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        step().backward()
    assert any(shape[-1:] == (VOCAB,) and len(shape) > 1 for shape in kept) == bool(off)


def test_ratio_of_one_is_the_users_loss() -> None:
    model = Model()
    loss = LOSSES["z_loss"]
    got = backward(model, compiled(lambda: loss(model(IDS)), min_tokens_ratio=1.0)())
    assert_same(got, backward(model, loss(model(IDS))))


def test_trained_temperature() -> None:
    """What goes into the values beside the logits has the gradient of the selected rows as well."""
    model = Model()
    target = IDS.roll(-1, 1)

    def values(z: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy((z * model.layer.bias[0].exp()).transpose(1, 2), target, reduction="none")

    got = backward(model, compiled(lambda: values(model(IDS)).square().mean(), min_tokens_ratio=RATIO, context=0)())
    picks = picks_of(model)
    with routing(model, hard_mask(picks.rows, SEQ), "routed", "project"):
        each = values(model(IDS))
        want = backward(model, (each.detach() + (each - each.detach()) * factors(picks)).square().mean())
    assert_same(got, want)


def mixing(z):
    return F.cross_entropy((z + 0.5 * z.roll(1, 1)).flatten(0, 1), IDS.flatten())


def reversed_tokens(z):
    return F.cross_entropy(z.flip(1).flatten(0, 1), IDS.flatten())


def similar_tokens(z):
    p = z.softmax(-1)
    return (p @ p.transpose(1, 2)).mean()


def scaled_by_itself(z):
    return F.cross_entropy((z / z.std()).flatten(0, 1), IDS.flatten())


def written_in_place(z):
    z = z * 1.0
    z[:, :, 5] = -10.0
    return F.cross_entropy(z.flatten(0, 1), IDS.flatten(), reduction="none").square().mean()


def smoothed_over_time(z):
    return F.cross_entropy(z.cumsum(1).flatten(0, 1), IDS.flatten())


def noisy(z):
    return F.cross_entropy(F.dropout(z, 0.5).flatten(0, 1), IDS.flatten(), reduction="none").mean()


def whole_distributions(z):
    return z.log_softmax(-1)


def other_flattening(z):
    """Not a row per position."""
    return F.cross_entropy(z.transpose(1, 2).reshape(-1, VOCAB), IDS.flatten())


UNSUPPORTED = {
    mixing: "'roll'",
    reversed_tokens: "'flip'",
    similar_tokens: "something else than a weight",
    scaled_by_itself: "'std'",
    written_in_place: "written in place",
    smoothed_over_time: "positions",
    noisy: "random numbers",
    whole_distributions: "'log_softmax'",
    other_flattening: "positions and classes together",
}


@pytest.mark.parametrize("loss", slow_but([mixing, written_in_place, whole_distributions], UNSUPPORTED))
def test_what_mixes_tokens_stays_dense(loss: Any) -> None:
    model = models.Decoder(layers=1)
    torch.manual_seed(0)
    got = backward(
        model, compiled(lambda: loss(model(IDS)), min_tokens_ratio=RATIO, fallback="silent")().square().mean()
    )
    assert not metrics(model)["matched"] and UNSUPPORTED[loss] in metrics(model)["fallback_reason"]
    torch.manual_seed(0)
    assert_same(got, backward(model, loss(model(IDS)).square().mean()))
