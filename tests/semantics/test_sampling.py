"""Weighted selections, end to end: the weights, what they estimate, and what nobody may notice."""

from __future__ import annotations

import math
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from models import SEQ, PlainLM, compiled, make_batch, slow_but
from ops.test_inclusion import expected
from reference import assert_same, backward, candidates, dense, difficulty, eager_call, hf_reference, reference, shift
from torch import Tensor
from training import RATIO, SLOTS, check_against_reference, complaints, metrics, picks

import cggr_compile

CHOICES: dict[str, dict[str, Any]] = {
    "importance": {"selection": "importance"},
    "importance-batch": {"scope": "batch"},
    "random-batch": {"selection": "random", "scope": "batch", "max_selected": 7},
    "stratified": {"selection": "stratified", "num_strata": 2},
    "spans": {"selection": "spans", "span": 3},
    "spans-batch": {"selection": "spans", "span": 3, "scope": "batch"},
    "labels": {"selection": "labels", "max_selected": 9, "context": 0},
    "topk-batch": {"selection": "topk", "scope": "batch"},
    "sequence_aware": {"selection": "sequence_aware", "min_tokens_per_sequence": 3},
}


def uneven() -> dict[str, Tensor]:
    """Three sequences with few, many and no labels."""
    batch = make_batch(3)
    batch["labels"][0, :6], batch["labels"][0, -6:] = -100, -100
    batch["labels"][2] = -100
    return batch


def by_position(chosen: Any, size: int = SEQ) -> Tensor:
    """Weights [B, S], 0 for what is not selected."""
    rows = torch.where(chosen.rows < 0, size, chosen.rows)
    return torch.zeros(rows.shape[0], size + 1).scatter(1, rows, chosen.weights)[:, :size]


ONE_OF_EACH = ["importance", "importance-batch", "stratified", "spans", "labels", "sequence_aware"]


@pytest.mark.parametrize("name", slow_but(ONE_OF_EACH, CHOICES))
def test_equals_the_weighted_reference(name: str) -> None:
    model, batch = PlainLM(), uneven()
    compiled(model, min_tokens_ratio=RATIO, router_layers="full", router_precision="model", **CHOICES[name])
    check_against_reference(model, batch)
    chosen, target = picks(model), shift(batch["labels"])
    valid = candidates(target)
    mask = by_position(chosen) > 0
    assert mask.sum() == (chosen.rows >= 0).sum() and not (mask & ~valid).any()
    with torch.no_grad():
        logits = eager_call(model, batch["input_ids"]).logits
    scores = difficulty(logits, target, "combined").float()
    weights = by_position(chosen)
    if name == "importance":
        torch.testing.assert_close(weights[mask], (1 / expected(scores, valid, SLOTS))[mask].float(), atol=0, rtol=1e-4)
    elif name == "stratified":  # halves of the ranking, half of the slots each
        for row in range(2):
            ranked = scores[row].masked_fill(~valid[row], -math.inf).argsort(descending=True)[: int(valid[row].sum())]
            for half in (ranked[: -(-len(ranked) // 2)], ranked[-(-len(ranked) // 2) :]):
                assert int(mask[row, half].sum()) == 2
                torch.testing.assert_close(weights[row, half][mask[row, half]], torch.full((2,), len(half) / 2))
    elif name == "spans":  # 4 slots: 2 blocks of 2
        pairs, count = valid.view(-1, SEQ // 2, 2), valid.view(-1, SEQ // 2, 2).sum(2)
        means = scores.where(valid, 0.0).view(-1, SEQ // 2, 2).sum(2) / count.clamp(min=1)
        p = expected(means, pairs.any(2), 2).repeat_interleave(2, 1)
        torch.testing.assert_close(weights[mask], (1 / p)[mask].float(), atol=0, rtol=1e-4)
        assert torch.equal(mask, valid & mask.view(-1, SEQ // 2, 2).any(2).repeat_interleave(2, 1))
    elif name == "labels":
        assert torch.equal(mask.sum(1), valid.sum(1).clamp(max=9))
        count = valid.sum(1, keepdim=True)
        torch.testing.assert_close(weights[mask], (count / count.clamp(1, 9)).expand(-1, SEQ)[mask])
        assert metrics(model)["labels_overflow"] == int((valid.sum(1) - 9).clamp(0).sum())
    elif name == "sequence_aware":
        assert (mask.sum(1) >= valid.sum(1).clamp(max=3)).all()
        assert int(mask.sum()) == min(3 * SLOTS, int(valid.sum(1).clamp(max=6).sum()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["importance", "importance-batch", "spans", "labels", "stratified"])
def test_the_loss_is_unbiased(name: str) -> None:
    """The mean over many selections is the loss over all labels; that of the hardest tokens is not."""
    model, batch = PlainLM(), uneven()
    want = float(eager_call(model, **batch).loss.detach())
    rounds = 300

    def mean_loss(**options: Any) -> tuple[float, float]:
        torch._dynamo.reset()
        compiled(model, min_tokens_ratio=RATIO, **options)
        losses = torch.stack([model(**batch).loss.detach() for _ in range(rounds)])
        return float(losses.mean()), float(losses.std()) / rounds**0.5

    mean, error = mean_loss(**CHOICES[name])
    assert 0 < error < 0.05 and abs(mean - want) < 4 * error, (mean, want, error)
    if name == "importance":
        hard, _ = mean_loss(selection="topk", scoring="loss", router_layers="full")
        assert hard - want > 10 * error


def test_all_labels_are_the_dense_loss() -> None:
    """As many slots as positions: prompt-masked fine-tuning, exactly."""
    model, batch = PlainLM(), uneven()
    compiled(model, selection="labels", max_selected=1.0, gradient="exact")
    assert_same(backward(model, model(**batch).loss), dense(model, batch))
    assert torch.equal(by_position(picks(model)) == 1, candidates(shift(batch["labels"])))
    assert metrics(model)["labels_overflow"] == 0


def test_overflow_is_counted_over_all_steps() -> None:
    model, batch = PlainLM(), make_batch()
    compiled(model, selection="labels", max_selected=12, scoring="random")
    overflow = int(((shift(batch["labels"]) != -100).sum(1) - 12).clamp(0).sum())
    assert overflow > 0
    for step in range(1, 4):
        model(**batch)
        assert metrics(model)["labels_overflow"] == step * overflow


def test_num_items_in_batch() -> None:
    """Divided by the user's count, not by the number of labels."""
    model, batch = PlainLM(), {**make_batch(), "num_items_in_batch": torch.tensor(77)}
    compiled(model, min_tokens_ratio=RATIO, scope="batch")
    check_against_reference(model, batch)


@pytest.mark.parametrize("name", slow_but(["importance", "labels"], CHOICES))
def test_ratio_one_is_the_unmodified_model(name: str) -> None:
    model, batch = PlainLM(), make_batch()
    compiled(model, min_tokens_ratio=1.0, **CHOICES[name])
    assert_same(backward(model, model(**batch).loss), dense(model, batch))


ONE_TOKEN = ["importance", "importance-batch", "stratified", "spans", "sequence_aware"]


@pytest.mark.parametrize("name", slow_but(["importance-batch", "stratified"], ONE_TOKEN))
def test_one_token(name: str) -> None:
    model, batch = PlainLM(), make_batch(1, 2, ignored=False)
    compiled(model, min_tokens_ratio=RATIO, **CHOICES[name])
    got = backward(model, model(**batch).loss)
    assert_same(got, hf_reference(model, batch, picks(model)), tolerance=1e-4)
    assert picks(model).rows[picks(model).rows >= 0].tolist() == [0] and by_position(picks(model), 2)[0, 0] == 1


def test_same_tokens_at_the_same_step() -> None:
    model, batch = PlainLM(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    runtime = cggr_compile.runtime(model)
    model(**batch)
    state = runtime.state_dict()
    model(**batch)
    first = picks(model)
    model(**batch)
    assert not torch.equal(picks(model).rows, first.rows)
    runtime.load_state_dict(state)
    model(**batch)
    assert all(torch.equal(*pair) for pair in zip(picks(model), first, strict=True))


SYMBOLIC = ["importance-batch", "spans", "spans-batch", "labels", "sequence_aware"]


@pytest.mark.parametrize("name", slow_but(["importance-batch", "labels"], SYMBOLIC))
def test_sizes_that_stay_symbolic(name: str) -> None:
    model = models.Decoder(layers=1)
    run = compiled(lambda ids, labels: F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()), **CHOICES[name])
    for length in (16, 24, 8):
        ids, labels = make_batch(2, length).values()
        for tensor in (ids, labels):
            torch._dynamo.mark_dynamic(tensor, 1)
        got = backward(model, run(ids, labels))
        assert_same(got, reference(model, lambda ids=ids: model(ids), labels, picks(model)))
    # a number of slots (labels) is guarded: shorter sequences get a graph of their own
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (2 if name == "labels" else 1)


def test_a_biased_selection_is_told_once() -> None:
    with complaints() as said:
        model = PlainLM()
        compiled(model, selection="topk")
        for length in (16, 24):
            model(**make_batch(2, length))
    assert len([text for text in said if "biased" in text]) == 1
