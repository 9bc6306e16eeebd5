"""Training steps of preference and policy optimisation, with selected rows: unbiased, and right at the edges."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import SEQ, compiled
from reference import assert_same, assert_zero, backward
from token_losses import ADVANTAGE, IDS, Model, expected, picks_of
from torch import Tensor
from training import metrics

import cggr_compile

COMPLETION = torch.zeros(2, SEQ - 1)
COMPLETION[0, 4:12] = COMPLETION[1, 6:] = 1


def log_p(logits: Tensor) -> Tensor:
    return logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]


def preference(logits: Tensor, mask: Tensor, reference: Tensor) -> Tensor:
    chosen, rejected = ((log_p(logits) - reference) * mask).sum(-1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def policy(logits: Tensor, mask: Tensor, reference: Tensor) -> Tensor:
    ratio = (log_p(logits) - reference).exp()
    each = -torch.min(ratio * ADVANTAGE, ratio.clamp(0.8, 1.2) * ADVANTAGE)
    return ((each * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


LOSSES = {"preference": preference, "policy": policy}


def old_values(model: Model) -> Tensor:
    return (log_p(model(IDS)) - 0.1 * torch.linspace(-1, 1, 2 * (SEQ - 1)).view(2, -1)).detach()


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_unbiased(name: str) -> None:
    """The mean gradient over many draws is the dense one, within four of its standard errors."""
    model, draws = Model(), 120
    reference = old_values(model)
    step = compiled(
        lambda mask: LOSSES[name](model(IDS), mask, reference),
        min_tokens_ratio=0.25,
        gradient="exact",
        selection="random",
        scoring="random",
    )
    runs = [backward(model, step(COMPLETION)) for _ in range(draws)]
    dense = backward(model, LOSSES[name](model(IDS), COMPLETION, reference))
    found = torch.stack([torch.cat([run.grads[name].flatten() for name in dense.grads]) for run in runs])
    wanted = torch.cat([grad.flatten() for grad in dense.grads.values()])
    error = (found.mean(0) - wanted).norm()
    spread = found.var(0).sum().div(draws).sqrt()
    assert error < 2 * spread, (error, spread)
    assert found[0].sub(wanted).norm() > 3 * error  # one draw is far from it
    assert all(torch.allclose(run.loss, dense.loss, rtol=1e-4, atol=1e-6) for run in runs)


def test_masked_tokens_contribute_nothing() -> None:
    model = Model()
    reference = old_values(model)
    step = compiled(lambda mask: preference(model(IDS), mask, reference), min_tokens_ratio=0.5, context=0)
    got = backward(model, step(COMPLETION))
    picks = picks_of(model)
    assert metrics(model)["tokens_total"] == int(COMPLETION.sum())
    selected = picks.rows[picks.rows >= 0]
    sequence = torch.arange(2)[:, None].expand_as(picks.rows)[picks.rows >= 0]
    assert F.pad(COMPLETION, (0, 1))[sequence, selected].all()
    assert_same(got, expected(model, lambda gate: preference(gate(model(IDS)), COMPLETION, reference), picks))


@pytest.mark.parametrize("empty", ["one completion", "all completions"])
def test_empty_completions(empty: str) -> None:
    model = Model()
    reference = old_values(model)
    step = compiled(lambda mask: policy(model(IDS), mask, reference), min_tokens_ratio=0.5, context=0)
    backward(model, step(COMPLETION))
    mask = COMPLETION.clone()
    mask[slice(0, 1) if empty == "one completion" else slice(None)] = 0
    got = backward(model, step(mask))
    if empty == "all completions":
        assert_zero(got)
        assert metrics(model)["tokens_selected"] == 0
    assert_same(got, expected(model, lambda gate: policy(gate(model(IDS)), mask, reference), picks_of(model)))


def test_no_labels_at_all() -> None:
    model = Model()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return (
            F.cross_entropy(logits.transpose(1, 2), labels)
            + 0.5 * F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").square().mean()
        )

    step = compiled(lambda labels: loss(model(IDS), labels), min_tokens_ratio=0.5)
    assert backward(model, step(IDS.clone())).loss > 0
    assert_zero(backward(model, step(torch.full_like(IDS, -100))))


def test_train_step_with_a_reference_model() -> None:
    """A step of the user's, with a forward of each model, that trains: the loss falls."""
    model = Model()
    frozen = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)

    @cggr_compile.train_step(min_tokens_ratio=0.5, compiler="eager", fallback="error")
    def step(model, frozen, optimizer, mask):
        with torch.no_grad():
            reference = log_p(frozen(IDS))
        loss = preference(model(IDS), mask, reference)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    losses = [float(step(model, frozen, optimizer, COMPLETION)) for _ in range(6)]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0] - 0.01
    assert metrics(model)["matched"] and metrics(model)["step"] == 6
