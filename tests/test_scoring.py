"""``scoring="excess"`` and functions as scores through the whole backend."""

from __future__ import annotations

import pytest
import torch
from models import PlainLM, compiled, make_batch
from reference import assert_same, backward, candidates, difficulty, eager_call, hardest, hf_reference, shift
from torch import Tensor
from training import RATIO, SLOTS, check_against_reference, metrics, picks, small

import cggr_compile

TOPK = {"selection": "topk", "router_layers": "full", "router_precision": "model", "min_tokens_ratio": RATIO}


@pytest.mark.parametrize("how", ["argument", "key"])
def test_excess_selects_by_the_loss_beyond_the_reference(how: str) -> None:
    model, batch = PlainLM(), make_batch()

    def step(batch: dict[str, Tensor], reference_loss: Tensor | None = None) -> Tensor:
        reference_loss = batch["reference_loss"] if reference_loss is None else reference_loss
        labels = cggr_compile.with_reference_loss(batch["labels"], reference_loss)
        return model(input_ids=batch["input_ids"], labels=labels, use_cache=False).loss

    run = compiled(step, scoring="excess", **TOPK)
    target = shift(batch["labels"])
    with torch.no_grad():
        loss = difficulty(eager_call(model, batch["input_ids"]).logits, target, "loss")
    for seed in (0, 1):
        reference_loss = torch.rand(2, 16, generator=torch.Generator().manual_seed(seed)) * 5
        got = run(batch, reference_loss) if how == "argument" else run({**batch, "reference_loss": reference_loss})
        assert metrics(model)["matched"] and metrics(model)["scoring"] == "excess"
        assert torch.equal(picks(model).rows, hardest(loss - reference_loss, candidates(target), SLOTS))
        assert_same(backward(model, got), hf_reference(model, batch, picks(model)))
    batch["labels"][0, 3] = 10**6
    with pytest.raises(ValueError, match="labels"):  # they are still looked at
        run({**batch, "reference_loss": reference_loss}, reference_loss if how == "argument" else None)


def test_excess_without_a_reference_loss_says_what_to_do() -> None:
    model = compiled(small(num_hidden_layers=1), scoring="excess", fallback="silent")
    with pytest.raises(ValueError, match=r"reference_loss.*with_reference_loss"):
        model(**make_batch())
    with pytest.raises(ValueError, match=r"reference_loss"):
        model(**make_batch(), reference_loss=torch.rand(2, 16))  # the graph does not see what nothing uses


def surprise(lse: Tensor, entropy: Tensor, top1: Tensor, top2: Tensor, label_logprob: Tensor) -> Tensor:
    return -label_logprob - entropy


def test_a_function_as_scoring() -> None:
    model, batch = PlainLM(), make_batch()
    compiled(model, scoring=surprise, **TOPK)
    check_against_reference(model, batch)
    target = shift(batch["labels"])
    with torch.no_grad():
        logits = eager_call(model, batch["input_ids"]).logits
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
    scores = difficulty(logits, target, "loss") - entropy
    assert torch.equal(picks(model).rows, hardest(scores, candidates(target), SLOTS))
    assert metrics(model)["scoring"].endswith("test_scoring.surprise")


def test_a_function_that_does_not_work_is_named() -> None:
    model = compiled(PlainLM(), scoring=lambda *s: 0.5, fallback="silent")
    with pytest.raises(ValueError, match=r"scoring: .*lambda"):
        model(**make_batch())
