"""Gradient accumulation, and losses divided by a number of the user's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import SEQ, VOCAB, PlainLM, compiled, make_batch
from reference import Run, assert_same, backward, collect, dense, hf_reference, shift
from torch import Tensor
from training import RATIO, Batch, metrics, picks


def micro_batches() -> list[Batch]:
    first, second = make_batch(2, seed=3), make_batch(2, seed=4)
    second["labels"][:, : SEQ // 2] = -100
    return [first, second]


@pytest.mark.parametrize(
    ("order", "kind"),
    [
        ("interleaved", "tensor"),
        ("forwards-first", "int"),
        pytest.param("interleaved", "int", marks=pytest.mark.slow),
        pytest.param("forwards-first", "tensor", marks=pytest.mark.slow),
    ],
)
def test_gradient_accumulation(order: str, kind: str) -> None:
    model, batches = PlainLM(), micro_batches()
    total = sum(int((shift(b["labels"]) != -100).sum()) for b in batches)
    for batch in batches:
        batch["num_items_in_batch"] = total if kind == "int" else torch.tensor(total)
    compiled(model, min_tokens_ratio=RATIO)

    losses, chosen = [], []
    for batch in batches:
        losses.append(model(**batch).loss)
        chosen.append(picks(model))
        if order == "interleaved":
            losses[-1].backward()
    if order == "forwards-first":
        for loss in losses:
            loss.backward()
    assert metrics(model)["matched"] is True, metrics(model)
    got = collect(model, sum(losses))

    parts = [hf_reference(model, batch, one) for batch, one in zip(batches, chosen, strict=True)]
    want = Run(sum(p.loss for p in parts), {n: sum(p.grads[n] for p in parts) for n in parts[0].grads})
    assert not torch.equal(chosen[0].rows, chosen[1].rows)
    assert_same(got, want)


def test_num_items_at_ratio_one() -> None:
    model, batch = PlainLM(), {**make_batch(), "num_items_in_batch": torch.tensor(77)}
    compiled(model, min_tokens_ratio=1.0)
    assert_same(backward(model, model(**batch).loss), dense(model, batch))


def test_own_normaliser() -> None:
    """cross_entropy(reduction="sum") divided by the user's own number, in the user's own function."""
    model, batch = PlainLM(), make_batch()
    count = 50

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.reshape(-1, VOCAB), labels[:, 1:].reshape(-1), reduction="sum") / count

    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, run(batch["input_ids"], batch["labels"]))
    full = {**batch, "num_items_in_batch": torch.tensor(count)}
    matched = metrics(model)["matched"]
    assert_same(got, hf_reference(model, full, picks(model)) if matched else dense(model, full))
