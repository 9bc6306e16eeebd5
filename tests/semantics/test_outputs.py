"""What a training forward returns beside the loss."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from models import SEQ, VOCAB, compiled, make_batch
from reference import assert_same, backward, dense, eager_call, hard_mask, hf_reference, routing, selected_loss, shift
from torch import Tensor
from training import RATIO, assert_selected_or_dense, metrics, picks, selected, small


@pytest.mark.parametrize("return_dict", [True, False])
def test_logits_drop(return_dict: bool) -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    output = model(**batch, return_dict=return_dict, use_cache=False)
    logits = output.logits if return_dict else output[1]
    assert tuple(logits.shape) == (2, 0, VOCAB) and not logits.requires_grad


def test_logits_detach() -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, logits="detach")
    output = model(**batch)
    assert not output.logits.requires_grad
    torch.testing.assert_close(output.logits, eager_call(model, **batch).logits.detach())
    assert_same(backward(model, output.loss), hf_reference(model, batch, picks(model)))


def test_other_outputs_carry_no_gradient() -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    # first eagerly: when transformers installs its hooks, at the first such call, it breaks the graph itself
    want = eager_call(model, **batch, output_hidden_states=True, use_cache=True)
    output = model(**batch, output_hidden_states=True, use_cache=True)
    assert len(output.hidden_states) == len(want.hidden_states)
    for got, expected in zip(output.hidden_states, want.hidden_states, strict=True):
        assert not got.requires_grad
        torch.testing.assert_close(got, expected.detach())
    for got, expected in zip(output.past_key_values.layers, want.past_key_values.layers, strict=True):
        assert not got.keys.requires_grad and not got.values.requires_grad
        torch.testing.assert_close(got.keys, expected.keys.detach())
        torch.testing.assert_close(got.values, expected.values.detach())
    assert_same(backward(model, output.loss), hf_reference(model, batch, picks(model)))


def test_graph_break_of_transformers_own_is_never_wrong() -> None:
    """The first call for hidden states (see above): model and loss are in two graphs, so nothing is rewritten."""
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, fallback="silent")
    for _ in range(2):
        output = model(**batch, output_hidden_states=True)
        got = backward(model, output.loss)
        if metrics(model)["matched"]:
            assert_same(got, hf_reference(model, batch, picks(model)))
        else:
            assert_same(got, dense(model, batch))


def test_figures_beside_the_loss() -> None:
    """Accuracy and perplexity computed from the same logits, without gradient, are the dense model's or say so."""
    model, batch = models.Decoder(), make_batch()
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
    model, batch = models.Decoder(), make_batch()
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
