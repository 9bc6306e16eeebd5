"""What a training forward returns beside the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from models import HIDDEN, SEQ, VOCAB, PlainLM, compiled, make_batch, slow_but
from reference import (
    Run,
    assert_same,
    backward,
    eager_call,
    hard_mask,
    hf_reference,
    routing,
    selected_loss,
    shift,
    worst,
)
from token_losses import factors, gated
from torch import Tensor, nn
from training import RATIO, assert_selected_or_dense, complaints, metrics, picks, selected, small


@pytest.mark.parametrize("return_dict", [True, False])
def test_logits_drop(return_dict: bool) -> None:
    model, batch = small(num_hidden_layers=1), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    output = model(**batch, return_dict=return_dict, use_cache=False)
    logits = output.logits if return_dict else output[1]
    assert tuple(logits.shape) == (2, 0, VOCAB) and not logits.requires_grad


def test_logits_detach() -> None:
    model, batch = PlainLM(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, logits="detach")
    output = model(**batch)
    assert not output.logits.requires_grad
    torch.testing.assert_close(output.logits, eager_call(model, **batch).logits.detach())
    assert_same(backward(model, output.loss), hf_reference(model, batch, picks(model)))


def test_hidden_states_keep_their_gradient_and_the_cache_has_none() -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    want = eager_call(model, **batch, output_hidden_states=True, use_cache=True)
    with complaints() as found:
        output = model(**batch, output_hidden_states=True, use_cache=True)
    (said,) = [message for message in found if "exact gradient" in message]
    assert "model.layers.0 to model.layers.1 (2 of 2 blocks)" in said
    for got, expected in zip(output.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(got, expected)
    for got, expected in zip(output.past_key_values.layers, want.past_key_values.layers, strict=True):
        assert not got.keys.requires_grad and not got.values.requires_grad
        torch.testing.assert_close(got.keys, expected.keys.detach())
        torch.testing.assert_close(got.values, expected.values.detach())
    got = backward(model, output.loss + sum(map(energy, output.hidden_states)))
    loss = selected_loss(want.logits, shift(batch["labels"]), picks(model))
    assert_same(got, backward(model, loss + sum(map(energy, want.hidden_states))))


def test_hidden_states_at_the_first_call() -> None:
    """transformers installs its hooks then, which would break the graph; the gradient is exact."""
    model, batch = small(num_hidden_layers=1), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    for _ in range(2):
        got = backward(model, model(**batch, output_hidden_states=True).loss)
        assert metrics(model)["level"] == "routed"
        logits = eager_call(model, **batch, output_hidden_states=True).logits
        assert_same(got, backward(model, selected_loss(logits, shift(batch["labels"]), picks(model))))


def test_figures_beside_the_loss() -> None:
    """Accuracy and perplexity computed from the same logits, without gradient, are the dense model's or say so."""
    model, batch = models.Decoder(layers=1), make_batch()
    args = batch["input_ids"], batch["labels"]

    def step(ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = model(ids)[:, :-1]
        loss = F.cross_entropy(logits.reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
        hits = (logits.argmax(-1) == labels[:, 1:]).float().mean()
        return loss, hits, loss.detach().exp()

    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    loss, hits, perplexity = run(*args)
    want = step(*args)
    assert hits == want[1]
    torch.testing.assert_close(perplexity, loss.detach().exp())
    got = backward(model, loss)
    assert_selected_or_dense(got, model, batch, lambda: model(args[0]), lambda: step(*args)[0])


def test_second_differentiable_output_keeps_its_gradient() -> None:
    """The step returns a loss and a penalty; the caller adds them after the compiled region."""
    model, batch = models.Decoder(layers=1), make_batch()
    args = batch["input_ids"], batch["labels"]

    def penalty() -> Tensor:
        return 0.1 * sum(block.up.weight.square().sum() for block in model.blocks)

    def step(ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(ids)
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)), penalty()

    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, sum(run(*args)))
    if metrics(model)["matched"]:
        with routing(model, hard_mask(selected(model), SEQ), "routed", "project"):
            loss = selected_loss(model(args[0]), shift(args[1]), picks(model))
            want = backward(model, loss + penalty())
    else:
        want = backward(model, sum(step(*args)))
    assert_same(got, want)


BLOCKS = 3


class Stateful(models.Decoder):
    """Returns what ``outputs(self, loss, states, logits)`` makes of its loss and of its hidden states.

    ``states``: the input of every block, then the last one's output, then the final norm's.
    """

    def __init__(self, outputs: Callable[..., Any]) -> None:
        super().__init__(fused=False, layers=BLOCKS)
        self.outputs, self.value = outputs, nn.Linear(HIDDEN, 1)
        models.randomise(self)

    def states(self, ids: Tensor, around: Callable[[int], Any] | None = None) -> list[Tensor]:
        states = [self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))]
        for i, block in enumerate(self.blocks):
            if around is None:
                states.append(block(states[-1]))
            else:
                with around(i):
                    states.append(block(states[-1]))
        return [*states, self.ln_f(states[-1])]

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        states = self.states(ids)
        logits = self.lm_head(states[-1])
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
        return self.outputs(self, loss, states, logits)

    def wanted(self, ids: Tensor, labels: Tensor, total: Callable[[Any], Tensor], dense: int, kv_gradient: str) -> Run:
        """What training on the selected positions gives, if the gradient is stopped from block ``dense`` on."""
        hard, target = hard_mask(selected(self), SEQ), shift(labels)

        def around(i: int) -> Any:
            return routing(self, hard, "routed" if i >= dense else "exact", kv_gradient)

        states = self.states(ids, around)
        logits = self.lm_head(states[-1])
        return backward(self, total(self.outputs(self, selected_loss(logits, target, picks(self)), states, logits)))


def energy(x: Tensor) -> Tensor:
    return 0.3 * x.square().mean()


def added(results: Any) -> Tensor:
    """Every element of the first result, and something of the others."""
    first, *rest = results if isinstance(results, tuple) else (results,)
    return first.sum() + sum(energy(x) for x in rest)


# what is returned, and how many of the three blocks are differentiated at every position for it
OUTPUTS: dict[str, tuple[Callable[..., Any], int]] = {
    "embedding": (lambda m, loss, x, z: (loss, x[0]), 0),
    "input of a block": (lambda m, loss, x, z: (loss, x[2]), 2),
    "every hidden state": (lambda m, loss, x, z: (loss, *x), 3),
    "logits beside hidden state": (lambda m, loss, x, z: (loss, z.detach(), x[1]), 1),
    "value head [B, S]": (lambda m, loss, x, z: (loss, m.value(x[2]).squeeze(-1)), 2),
    "value head [B, S, 1]": (lambda m, loss, x, z: (loss, m.value(x[-1])), 3),
    "loss per sequence": (lambda m, loss, x, z: (loss, x[1].square().mean((1, 2))), 1),
    "number that the loss does not add": (lambda m, loss, x, z: (loss, energy(x[2])), 2),
    "number that it adds": (lambda m, loss, x, z: (loss + (e := energy(x[2])), e), 0),
    "[1] that it adds": (lambda m, loss, x, z: (loss[None] + (e := energy(x[2]).view(1)), e), 0),
    "loss [1]": (lambda m, loss, x, z: loss.unsqueeze(0), 0),
    "stacked losses": (lambda m, loss, x, z: torch.stack([loss, energy(x[2])]), 0),
    "stacked losses and a state": (lambda m, loss, x, z: (torch.stack([loss, energy(x[3])]), x[1]), 1),
    "a view of a state twice": (lambda m, loss, x, z: (loss, x[2][:, ::3], x[2].mT), 2),
    "loss twice": (lambda m, loss, x, z: (loss, loss * 2), 0),
    "behind a detached factor": (lambda m, loss, x, z: (loss, m.value.weight * x[3].detach().mean()), 0),
    "state times detached loss": (lambda m, loss, x, z: (loss, x[1] * loss.detach()), 1),
}


QUICK = [
    *("embedding", "every hidden state", "value head [B, S]", "loss per sequence", "[1] that it adds"),
    *("stacked losses and a state", "a view of a state twice", "state times detached loss"),
]


@pytest.mark.parametrize("name", slow_but(QUICK, OUTPUTS))
def test_every_output_keeps_its_exact_gradient(name: str) -> None:
    outputs, dense = OUTPUTS[name]
    kv_gradient = "stop" if len(name) % 2 else "project"
    model, (ids, labels) = Stateful(outputs), make_batch().values()
    compiled(model, min_tokens_ratio=RATIO, kv_gradient=kv_gradient)
    with complaints() as found:
        got = backward(model, added(model(ids, labels)))
    assert metrics(model)["matched"] is True, metrics(model)
    assert_same(got, model.wanted(ids, labels, added, dense, kv_gradient))
    if 0 < dense < BLOCKS:  # the check can fail
        for other in (dense - 1, dense + 1):
            assert worst(got, model.wanted(ids, labels, added, other, kv_gradient))[0] > 1e-4
    said = [message for message in found if "exact gradient" in message]
    assert len(said) == bool(dense), found
    if dense:
        assert f"({dense} of {BLOCKS} blocks)" in said[0] and ".detach()" in said[0]
        assert not any("part of the backward" in message for message in found), found  # the same in other words


PLAIN = ["every hidden state", "value head [B, S]", "stacked losses", "loss [1]"]


@pytest.mark.parametrize("name", slow_but(["every hidden state", "stacked losses"], PLAIN))
def test_outputs_are_those_of_plain_pytorch(name: str) -> None:
    """Where every label is selected and the gradient is exact."""
    model, (ids, labels) = Stateful(OUTPUTS[name][0]), make_batch().values()
    compiled(model, selection="labels", max_selected=1.0, gradient="exact")
    got = backward(model, added(model(ids, labels)))
    assert_same(got, backward(model, added(eager_call(model, ids, labels))))


FROM_LOGITS: dict[str, Callable[..., Any]] = {
    "entropies": lambda m, loss, x, z: (loss, -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)),
    "z-loss per token": lambda m, loss, x, z: (loss, z.logsumexp(-1)),
    "a word": lambda m, loss, x, z: (loss, z[..., 3]),
    "z-loss in a loss [1]": lambda m, loss, x, z: loss.view(1) + 1e-2 * z.square().mean((1, 2)).sum(0, keepdim=True),
}
WHOLE: dict[str, Callable[..., Any]] = {
    "log-probabilities": lambda m, loss, x, z: (loss, z.log_softmax(-1)),
    "two words": lambda m, loss, x, z: (loss, z[..., 3:5]),
    "some rows of them": lambda m, loss, x, z: (loss, z[torch.arange(2), torch.tensor([3, 5])]),
}


@pytest.mark.parametrize("name", slow_but(["z-loss per token", "z-loss in a loss [1]"], FROM_LOGITS))
def test_what_is_computed_from_the_logits_of_each_position(name: str) -> None:
    """Per-token values, returned: the caller's loss takes their gradient at the selected positions."""
    model, (ids, labels) = Stateful(FROM_LOGITS[name]), make_batch().values()
    compiled(model, min_tokens_ratio=RATIO, context=0)
    got = backward(model, added(model(ids, labels)))
    factor = factors(picks(model))
    hook = model.lm_head.register_forward_hook(lambda module, args, logits: gated(logits, factor))
    with hook, routing(model, hard_mask(selected(model), SEQ), "routed", "project"):
        assert_same(got, backward(model, added(eager_call(model, ids, labels))))


@pytest.mark.parametrize("name", slow_but(["two words"], WHOLE))
def test_classes_that_are_returned_need_them_all(name: str) -> None:
    model, (ids, labels) = Stateful(WHOLE[name]), make_batch().values()
    compiled(model, min_tokens_ratio=RATIO, fallback="warn")
    with complaints() as found:
        got = backward(model, added(model(ids, labels)))
    assert metrics(model)["matched"] is False
    assert any("is returned" in message or "not understood" in message for message in found), found
    assert_same(got, backward(model, added(eager_call(model, ids, labels))))


@pytest.mark.parametrize(
    "objective", slow_but(["stacked losses", "value head [B, S]"], ["loss [1]", "stacked losses", "value head [B, S]"])
)
def test_measured_noise_knows_what_the_loss_is(objective: str) -> None:
    """``auto`` differentiates the loss, whatever its shape; at a quarter of the tokens the error is not zero."""
    model, (ids, labels) = Stateful(OUTPUTS[objective][0]), make_batch().values()
    compiled(model, min_tokens_ratio="auto", ladder=[1.0, RATIO], measure_every=1, variance_bound=1e-9)
    for _ in range(3):
        backward(model, added(model(ids, labels.roll(1, 0))))
    assert metrics(model)["added_variance"] not in (None, 0.0)
