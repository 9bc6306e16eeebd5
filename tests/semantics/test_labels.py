"""Labels: ignored ones, few, none, shifted already, or wrong."""

from __future__ import annotations

import math
import re

import pytest
import torch
from models import SEQ, VOCAB, compiled, make_batch
from reference import assert_same, assert_zero, backward, dense, eager_call, reference, shift
from training import RATIO, SLOTS, check_against_reference, metrics, picks, selected, small


def test_same_tensor_as_input_and_labels() -> None:
    model, ids = small(), make_batch()["input_ids"]
    compiled(model, min_tokens_ratio=RATIO)
    check_against_reference(model, {"input_ids": ids, "labels": ids})


def test_few_labels() -> None:
    """One sequence has fewer labels than slots, one has none: the mean is over what there is."""
    model, batch = small(), make_batch(3)
    batch["labels"][0, :-2] = -100
    batch["labels"][1] = -100
    compiled(model, min_tokens_ratio=RATIO)
    check_against_reference(model, batch)
    used = (selected(model) >= 0).sum(1).tolist()
    assert used == [2, 0, SLOTS]


@pytest.mark.parametrize("gradient", ["exact", "routed"])
def test_no_label_at_all(gradient: str) -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, gradient=gradient)
    check_against_reference(model, batch, gradient=gradient)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert_zero(backward(model, model(**batch).loss))
    assert (selected(model) == -1).all()
    assert all(not (isinstance(v, float) and math.isnan(v)) for v in metrics(model).values()), metrics(model)


@pytest.mark.parametrize("num_items", [0, 40])
def test_no_label_in_a_micro_batch(num_items: int) -> None:
    """Accumulation: this micro-batch has no label, or (0) none of them has."""
    model, batch = small(), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    compiled(model, min_tokens_ratio=RATIO)
    assert_zero(backward(model, model(**batch, num_items_in_batch=torch.tensor(num_items)).loss))


def test_shift_labels() -> None:
    """transformers' own argument for labels that are shifted already: those are the loss's targets."""
    model, batch = small(), make_batch()
    ahead = shift(batch["labels"]).roll(2, dims=1)  # plainly not a shift of labels
    compiled(model, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, model(**batch, shift_labels=ahead, use_cache=False).loss)
    if metrics(model)["matched"]:
        want = reference(model, lambda: eager_call(model, batch["input_ids"]).logits, ahead, picks(model))
    else:
        want = dense(model, {**batch, "shift_labels": ahead})
    assert_same(got, want)


@pytest.mark.parametrize("bad", [VOCAB, -7])
def test_label_outside_the_vocabulary(bad: int) -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    model(**batch).loss.backward()
    batch["labels"][1, 3] = bad
    with pytest.raises(ValueError, match="labels"):
        model(**batch)


def test_labels_of_another_shape() -> None:
    """torch itself refuses while Dynamo traces the model, before any backend: then its message names the shapes."""
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    batch["labels"] = batch["labels"][:, :-3]
    with pytest.raises(Exception) as caught:
        model(**batch)
    if isinstance(caught.value, ValueError) and "cggr" in str(caught.traceback[-1].path):
        assert "labels" in str(caught.value)
    else:
        numbers = set(re.findall(r"\d+", str(caught.value)))
        assert {str(2 * SEQ), str(2 * (SEQ - 3))} <= numbers, caught.value
