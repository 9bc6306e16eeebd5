"""Labels: ignored ones, few, none, shifted already, or wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import models
import pytest
import torch
import torch.nn.functional as F
from models import SEQ, VOCAB, PlainLM, compiled, make_batch, slow_but
from reference import assert_same, assert_zero, backward, dense, eager_call, reference, shift
from torch import Tensor
from training import RATIO, SLOTS, as_on_an_accelerator, check_against_reference, metrics, picks, selected, small


def test_same_tensor_as_input_and_labels() -> None:
    model, ids = PlainLM(), make_batch()["input_ids"]
    compiled(model, min_tokens_ratio=RATIO)
    check_against_reference(model, {"input_ids": ids, "labels": ids})


def test_few_labels() -> None:
    """One sequence has fewer labels than slots, one has none: the mean is over what there is."""
    model, batch = PlainLM(), make_batch(3)
    batch["labels"][0, :-2] = -100
    batch["labels"][1] = -100
    compiled(model, min_tokens_ratio=RATIO, selection="importance")
    check_against_reference(model, batch)
    used = (selected(model) >= 0).sum(1).tolist()
    assert used == [2, 0, SLOTS]


@pytest.mark.parametrize("gradient", ["exact", "routed"])
def test_no_label_at_all(gradient: str) -> None:
    model, batch = PlainLM(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, gradient=gradient)
    check_against_reference(model, batch, gradient=gradient)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert_zero(backward(model, model(**batch).loss))
    assert (selected(model) == -1).all()
    assert all(not (isinstance(v, float) and math.isnan(v)) for v in metrics(model).values()), metrics(model)


@pytest.mark.parametrize("num_items", [0, 40])
def test_no_label_in_a_micro_batch(num_items: int) -> None:
    """Accumulation: this micro-batch has no label, or (0) none of them has."""
    model, batch = PlainLM(), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    compiled(model, min_tokens_ratio=RATIO)
    assert_zero(backward(model, model(**batch, num_items_in_batch=torch.tensor(num_items)).loss))


def test_shift_labels() -> None:
    """transformers' own argument for labels that are shifted already: those are the loss's targets."""
    model, batch = small(num_hidden_layers=1), make_batch()
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
    model, batch = PlainLM(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    model(**batch).loss.backward()
    batch["labels"][1, 3] = bad
    with pytest.raises(ValueError, match="labels"):
        model(**batch)


def test_labels_of_another_shape() -> None:
    """torch itself refuses while Dynamo traces the model, before any backend: then its message names the shapes."""
    model, batch = small(num_hidden_layers=1), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    batch["labels"] = batch["labels"][:, :-3]
    with pytest.raises(Exception) as caught:
        model(**batch)
    if isinstance(caught.value, ValueError) and "cggr" in str(caught.traceback[-1].path):
        assert "labels" in str(caught.value)
    else:
        numbers = set(re.findall(r"\d+", str(caught.value)))
        assert {str(2 * SEQ), str(2 * (SEQ - 3))} <= numbers, caught.value


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), target[:, 1:].reshape(-1))


def noted(labels: Tensor) -> Tensor:
    labels[labels == -200] = -100  # into the caller's tensor
    return labels


def drawn(labels: Tensor) -> Tensor:
    return torch.where(torch.rand(labels.shape) < 0.3, -200, labels)


# how a model makes its target of -200 and of labels: the first is legal, whatever the loss ignores
TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "where": lambda labels, _: torch.where(labels == -200, -100, labels),
    "masked_fill": lambda labels, _: labels.masked_fill(labels == -200, -100),
    "in place": lambda labels, _: noted(labels),
    "in place, a copy": lambda labels, _: noted(labels.clone()),
    "of two inputs": lambda labels, ids: torch.where(ids % 3 == 0, -100, labels.maximum(torch.tensor(-100))),
    "at random": lambda labels, _: drawn(labels).masked_fill(labels == -200, -100).maximum(torch.tensor(-100)),
    "of the logits": lambda labels, _: labels.maximum(torch.tensor(-100)),
    "by a table": lambda labels, _: torch.arange(-100, VOCAB)[labels.clamp(min=-100) + 100],
}


QUICK = ["where", "in place", "of two inputs", "at random", "of the logits", "by a table"]


@pytest.mark.parametrize("name", slow_but(QUICK, TARGETS))
def test_labels_that_the_model_maps(name: str) -> None:
    """The range is that of the target, as the loss gets it, not that of what the model is called with."""
    model, batch = models.Decoder(), make_batch()
    ids = batch["input_ids"]

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        target = TARGETS[name](labels, ids)
        logits = model(ids)
        if name == "of the logits":  # its own best guess where the label is missing
            target = torch.where(labels == -150, logits.argmax(-1), target)
        return loss_of(logits, target)

    labels = batch["labels"]
    labels[:, 3] = -200
    labels[0, 9] = -150 if name == "of the logits" else -200
    run = compiled(step, selection="labels", max_selected=1.0, gradient="exact", fallback="silent")
    torch.manual_seed(5)
    got = backward(model, run(ids, labels.clone()))
    torch.manual_seed(5)
    assert_same(got, backward(model, step(ids, labels.clone())))
    matched = metrics(model)["matched"]
    assert matched is (name != "of the logits")
    labels[1, 5:] = VOCAB + 3
    ids[1, 5:] = 1
    torch.manual_seed(5)
    theirs = name == "by a table" or not matched  # PyTorch's own error
    said = "out of" if theirs else rf"labels must be in \[0, {VOCAB}\) or -100 .* got {VOCAB + 3}"
    with pytest.raises(IndexError if theirs else ValueError, match=said):
        run(ids, labels.clone())


@pytest.mark.parametrize("at", ["first", "later"])
def test_an_accelerator_asserts(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the first batch is looked at, and the graph asserts in every later step, for unselected labels too."""
    as_on_an_accelerator(monkeypatch)
    model, batch = PlainLM(), make_batch()
    compiled(model, min_tokens_ratio=0.1)
    if at == "later":
        model(**batch).loss.backward()
    batch["labels"][1, 1:5] = torch.arange(VOCAB, VOCAB + 4)
    error = ValueError if at == "first" else RuntimeError
    with pytest.raises(error, match=rf"labels must be in \[0, {VOCAB}\) or -100"):
        model(**batch)


def test_a_wrong_label_does_not_spoil_the_next_step() -> None:
    model, batch = PlainLM(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    right = batch["labels"].clone()
    batch["labels"][0, 9] = VOCAB
    with pytest.raises(ValueError, match="labels must be in"):
        model(**batch)
    batch["labels"] = right
    check_against_reference(model, batch)
