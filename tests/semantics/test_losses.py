"""Losses that must not be silently changed."""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch
import torch.nn.functional as F
from models import SEQ, VOCAB, compiled, make_batch
from reference import assert_same, backward, hard_mask, reference, routing, selected_loss, shift
from token_losses import expected
from torch import Tensor
from training import RATIO, cross_entropy_and, gradient_of, metrics, picks, selected, small


def unreduced(logits: Tensor, labels: Tensor) -> Tensor:
    nll = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), reduction="none")
    weight = torch.linspace(0.5, 1.5, nll.numel())
    return (nll * weight).sum() / weight.sum()


def class_weights(logits: Tensor, labels: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 1.5, VOCAB)
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), weight=weight)


def two_heads_of_time(logits: Tensor, labels: Tensor) -> Tensor:
    """Predicts the next token and the one after from the same logits."""
    one = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
    return one + 0.5 * F.cross_entropy(logits[:, :-2].reshape(-1, VOCAB), labels[:, 2:].reshape(-1))


def per_sequence(logits: Tensor, labels: Tensor) -> Tensor:
    """Sequence classification by the last token: not a token-level loss."""
    return F.cross_entropy(logits[:, -1], labels[:, -1].clamp_min(0))


def soft_targets(logits: Tensor, labels: Tensor) -> Tensor:
    target = F.one_hot(labels.clamp_min(0), VOCAB).float() * 0.9 + 0.1 / VOCAB
    return F.cross_entropy(logits.reshape(-1, VOCAB), target.reshape(-1, VOCAB))


def temperature_from_data(logits: Tensor, labels: Tensor) -> Tensor:
    scaled = logits / (1 + labels[:, :1, None].float().abs() / 100)
    return F.cross_entropy(scaled[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


def mixed_positions(logits: Tensor, labels: Tensor) -> Tensor:
    smooth = logits + 0.5 * logits.roll(1, dims=1)
    return F.cross_entropy(smooth[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


def reversed_time(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flip(1)[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "z-loss": cross_entropy_and(lambda logits: 1e-2 * logits.logsumexp(-1).square().mean()),
    "logit-penalty": cross_entropy_and(lambda logits: 1e-2 * logits.square().mean()),
    "reduction-none": unreduced,
    "class-weights": class_weights,
    "two-losses": two_heads_of_time,
    "per-sequence": per_sequence,
    "soft-targets": soft_targets,
    "temperature": temperature_from_data,
    "mixed-positions": mixed_positions,
    "reversed": reversed_time,
}


@pytest.mark.parametrize("name", LOSSES)
def test_unusual_loss_is_the_users_loss(name: str) -> None:
    """None of these is the selected loss we define: either it is the unmodified one, or made of per-token values."""
    model, batch = models.Decoder(), make_batch()

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return LOSSES[name](model(ids), labels)

    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent", context=0)
    args = batch["input_ids"], batch["labels"]
    got = backward(model, run(*args))
    assert metrics(model)["matched"] is (name not in ("mixed-positions", "reversed"))
    assert bool(metrics(model)["fallback_reason"]) is not metrics(model)["matched"]
    if metrics(model)["matched"]:
        want = expected(model, lambda gate: LOSSES[name](gate(model(args[0])), args[1]), picks(model))
    else:
        want = backward(model, step(*args))
    assert_same(got, want)


def test_loss_plus_something_else_keeps_both() -> None:
    """A weight penalty does not touch the logits: the token loss is selected, the penalty is exact."""
    model, batch = models.Decoder(), make_batch()

    def penalty() -> Tensor:
        return 0.1 * model.blocks[0].up.weight.square().sum()

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return 2.0 * cross_entropy_and(lambda _: torch.zeros(()))(model(ids), labels) + penalty()

    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, run(batch["input_ids"], batch["labels"]))
    if metrics(model)["matched"]:
        target = shift(batch["labels"])
        with routing(model, hard_mask(selected(model), SEQ), "routed", "project"):
            want = backward(model, 2.0 * selected_loss(model(batch["input_ids"]), target, picks(model)) + penalty())
    else:
        want = backward(model, step(batch["input_ids"], batch["labels"]))
    assert_same(got, want)


def test_hidden_state_penalty_is_not_dropped() -> None:
    """A loss on hidden states beside the cross-entropy needs the gradient of every position."""
    model, batch = small(), make_batch()

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        output = model(input_ids=ids, labels=labels, output_hidden_states=True, use_cache=False)
        return output.loss + 0.1 * output.hidden_states[1].square().mean()

    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, run(batch["input_ids"], batch["labels"]))
    if not metrics(model)["matched"]:
        assert_same(got, backward(model, step(batch["input_ids"], batch["labels"])))
        return
    with routing(model, hard_mask(selected(model), SEQ), gradient_of(model), "project"):
        output = model(batch["input_ids"], output_hidden_states=True, use_cache=False)
        loss = selected_loss(output.logits, shift(batch["labels"]), picks(model))
        want = backward(model, loss + 0.1 * output.hidden_states[1].square().mean())
    assert_same(got, want)


@pytest.mark.parametrize("how", ["nll_loss", "gather"])
def test_cross_entropy_by_other_means(how: str) -> None:
    model, batch = models.Decoder(), make_batch()
    args = batch["input_ids"], batch["labels"]

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        log_p = F.log_softmax(model(ids)[:, :-1], dim=-1)
        if how == "nll_loss":
            return F.nll_loss(log_p.reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
        wanted = labels[:, 1:].clamp_min(0)
        return -(log_p.gather(-1, wanted[..., None])[..., 0] * (labels[:, 1:] != -100)).sum() / (labels != -100).sum()

    run = compiled(step, min_tokens_ratio=RATIO, context=0)
    got = backward(model, run(*args))
    if how == "nll_loss":  # one cross-entropy
        assert_same(got, reference(model, lambda: model(args[0]), shift(batch["labels"]), picks(model)))
        return

    def gated_loss(gate: Callable[..., Tensor]) -> Tensor:
        log_p = F.log_softmax(gate(model(args[0]))[:, :-1], dim=-1)
        wanted = args[1][:, 1:].clamp_min(0)
        return -(log_p.gather(-1, wanted[..., None])[..., 0] * (args[1][:, 1:] != -100)).sum() / (args[1] != -100).sum()

    assert_same(got, expected(model, gated_loss, picks(model)))
