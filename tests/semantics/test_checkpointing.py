"""Activation checkpointing through the whole backend, inside the model and around it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import models
import pytest
import torch
from models import compiled, make_batch
from reference import Picks, Run, assert_same, backward, reference, shift
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import RATIO, check_against_reference, metrics, picks, small

BATCH = make_batch(ignored=False)
DENSE = Picks(torch.arange(models.SEQ - 1).expand(2, -1), torch.ones(2, models.SEQ - 1))


def test_checkpointing() -> None:
    model, batch = small(), make_batch()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False  # transformers' own warning about it would break the graph
    compiled(model, min_tokens_ratio=RATIO)
    for _ in range(2):
        check_against_reference(model, batch)


def decoder(**options: object) -> nn.Module:
    model = models.SlicedLoss()
    del model.blocks[1:]
    return compiled(model, gradient="exact", min_tokens_ratio=RATIO, **options)  # type: ignore[no-any-return]


def around(model: nn.Module, **arguments: bool) -> Tensor:
    """A checkpoint around a call of the compiled model."""
    switch = torch.zeros((), requires_grad=True)

    def call(switch: Tensor) -> Tensor:
        return model(*BATCH.values()) + 0 * switch

    return checkpoint(call, switch, **{"use_reentrant": False, **arguments})  # type: ignore[no-any-return]


def selected_run(model: nn.Module, chosen: Picks) -> Run:
    """The loss over these positions alone, and its gradients."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    return reference(twin, lambda: twin(BATCH["input_ids"]), shift(BATCH["labels"]), chosen, gradient="exact")


def test_a_checkpoint_around_the_compiled_model() -> None:
    """The first call, which compiles, and a later one; another forward comes between forward and recomputation."""
    model = decoder(verify=True)
    for forwards in (2, 4):
        loss, chosen = around(model), picks(model)
        model(*BATCH.values())
        between = picks(model)
        assert not torch.equal(chosen.rows, between.rows)
        want = selected_run(model, chosen)
        assert_same(backward(model, loss), want)
        assert metrics(model)["step"] == metrics(model)["verify_steps"] == forwards
        assert torch.equal(picks(model).rows, between.rows)


def test_recomputations_stay_at_their_rung() -> None:
    """The backward passes come in the other order, when the schedule is further on."""
    model, runs = decoder(warmup_steps=2), []
    for ratio in (1.0, 0.75, 0.25):
        loss = around(model)
        assert metrics(model)["ratio"] == ratio
        runs.append((loss, DENSE if ratio == 1.0 else picks(model)))
    for loss, chosen in reversed(runs):
        want = selected_run(model, chosen)
        assert_same(backward(model, loss), want)
    assert (metrics(model)["step"], metrics(model)["ratio"]) == (3, 0.25)


def test_reentrant_checkpoints() -> None:
    """Their forward is without gradients, so it is the model's own; the backward pass selects, and counts one step."""
    model = decoder()
    for step in (1, 2):
        loss = around(model, use_reentrant=True)
        assert metrics(model)["step"] == step - 1
        torch.testing.assert_close(loss, model.forward(*BATCH.values()))
        got = backward(model, loss)
        assert metrics(model)["step"] == step
        want = selected_run(model, picks(model))
        assert_same(Run(want.loss, got.grads), want)


@pytest.mark.parametrize("options", [{}, {"verify": 1}, {"warmup_steps": 1}], ids=str)
def test_hooks_of_the_user_see_what_the_forward_saves(options: dict[str, int]) -> None:
    """Nothing that is computed to compile it, at the first call or at a later rung, and nothing computed beside it."""
    model, counts = decoder(**options), []

    def pack(tensor: Tensor) -> Tensor:
        assert type(tensor) in (Tensor, nn.Parameter)
        counts[-1] += 1
        return tensor

    def saved(run: Callable[[], Tensor]) -> int:
        counts.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run().backward()
        return counts[-1]

    first, *later = (saved(lambda: model(*BATCH.values())) for _ in range(3))
    assert len(set(later)) == 1 and later[0] > 0
    assert first == later[0] or "warmup_steps" in options  # which begins with the dense graph
