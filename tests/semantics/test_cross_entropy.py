"""``cross_entropy="fused"``: the same loss and gradients, without the logits of the selected rows.

The controls of its operator are in tests/ops/test_linear_cross_entropy.py.
"""

from __future__ import annotations

import re
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, compiled, make_batch
from reference import assert_same, backward, dense, eager_call, hf_reference, named_leaves, overall, reference, shift
from test_verify import verified
from torch import Tensor, nn
from training import (
    RATIO,
    as_on_an_accelerator,
    check_against_reference,
    cross_entropy_and,
    metrics,
    padded,
    picks,
    small,
)

import cggr_compile

FUSED = {"cross_entropy": "fused", "min_tokens_ratio": RATIO}


def tiny(name: str = "llama", **overrides: Any) -> nn.Module:
    return small(name, num_hidden_layers=1, **overrides)


def passes_of(model: nn.Module) -> dict[str, cggr_compile.report.PassRecord]:
    (report,) = cggr_compile.runtime(model).reports
    return {record.name: record for record in report.passes}


# bias; soft-cap; scales, both ways
@pytest.mark.parametrize("name", ["phi", "gemma2", "cohere", "granite"])
def test_families(name: str) -> None:
    model, batch = tiny(name), make_batch()
    compiled(model, **FUSED)
    check_against_reference(model, batch)


@pytest.mark.parametrize(
    ("selection", "gradient"),
    [
        pytest.param("importance", {"gradient": "exact"}, marks=pytest.mark.slow),
        ("topk", {"kv_gradient": "stop"}),
    ],
)
def test_modes_and_weights(selection: str, gradient: dict[str, str]) -> None:
    model, batch = tiny(), padded("right")
    compiled(model, **FUSED, **gradient, selection=selection)
    check_against_reference(model, {**batch, "num_items_in_batch": torch.tensor(19)}, **gradient)


def test_no_logits_and_nothing_dense(tmp_path) -> None:
    """The row-sparse pass has nothing to make dense, and the control shows that it would see the logits."""
    found = {}
    for choice in ("logits", "fused"):
        model, folder = tiny(vocab_size=151), tmp_path / choice
        compiled(model, min_tokens_ratio=RATIO, cross_entropy=choice, scoring="random", dump_dir=str(folder))
        check_against_reference(model, make_batch())
        records = passes_of(model)
        assert records["row_sparse"].matched and not records["row_sparse"].details["densified"]
        told = {"logits": "from their logits", "fused": "fused with the head: no logits"}
        assert told[choice] in records["rewrite_loss"].reason
        # activations over the vocabulary: rows of the weight are 32 wide
        text = max(folder.glob("*_joint_*.py")).read_text()
        found[choice] = set(re.findall(r"[bf]\d+\[([\d, ]+), 151\]", text)) - {"32", "2, 0"}
    assert found["logits"] and not found["fused"]


@pytest.mark.parametrize("transposed", [False, True])
def test_smoothing_bias_and_stored_the_other_way(transposed: bool) -> None:
    """A head with a bias, and one that is a product with [H, V]; the loss is a sum, divided by the user's number."""
    decoder, batch = models.Functional() if transposed else models.Decoder(bias=True, tied=False), make_batch()

    def logits(ids: Tensor) -> Tensor:
        return decoder(decoder.params, ids) if transposed else decoder(ids)

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        given = logits(ids)[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)
        return F.cross_entropy(*given, reduction="sum", label_smoothing=0.1) / 7

    got = backward(decoder, compiled(step, **FUSED)(*batch.values()))
    chosen, target = picks(named_leaves(decoder)), shift(batch["labels"])
    loss = {"num_items": 7, "label_smoothing": 0.1}
    assert_same(got, reference(decoder, lambda: logits(batch["input_ids"]), target, chosen, **loss))


def test_ignored_class_and_wrong_labels() -> None:
    """An ``ignore_index`` inside the vocabulary, and a label outside that is not ignored: an error as ever."""
    model, batch = models.Decoder(), make_batch(ignored=False)
    ids = batch["input_ids"]
    labels = torch.where(ids < 60, 0, ids)

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).view(-1, VOCAB), labels.view(-1), ignore_index=0)

    run = compiled(step, **FUSED, selection="topk")
    got = backward(model, run(ids, labels))
    target = torch.where(labels == 0, -100, labels)
    assert_same(got, reference(model, lambda: model(ids), target, picks(model)))
    labels[:, :] = VOCAB + 1
    with pytest.raises(ValueError, match="labels must be in"):
        run(ids, labels)


def test_labels_that_the_backend_cannot_check(monkeypatch) -> None:
    """On an accelerator nobody looks at the labels before the step: the graph itself asserts."""
    as_on_an_accelerator(monkeypatch)
    model, batch = tiny(), make_batch()
    compiled(model, **FUSED)
    model(**batch).loss.backward()
    batch["labels"].fill_(VOCAB)
    with pytest.raises(RuntimeError, match="labels must be in"):
        model(**batch)


def test_logits_are_still_there_if_asked_for() -> None:
    model, batch = tiny("gemma2"), make_batch()
    compiled(model, **FUSED, logits="detach")
    output = model(**batch)
    torch.testing.assert_close(output.logits, eager_call(model, **batch).logits.detach())
    assert_same(backward(model, output.loss), hf_reference(model, batch, picks(model)))


def test_no_candidates() -> None:
    model, batch = tiny(), make_batch()
    batch["labels"].fill_(-100)
    compiled(model, **FUSED)
    got = backward(model, model(**batch).loss)
    assert got.loss == 0 and not any(gradient.any() for gradient in got.grads.values())


def test_ratio_one_is_the_unmodified_model() -> None:
    model, batch = tiny(), make_batch()
    compiled(model, cross_entropy="fused", min_tokens_ratio=1.0)
    assert_same(backward(model, model(**batch).loss), dense(model, batch))
    assert "rewrite_loss" not in passes_of(model)


def test_own_z_loss_is_a_value_beside_the_loss() -> None:
    """Not the operator's: per-token values, of which the loss stays what it is (see test_token_values.py)."""
    model, batch = models.Decoder(), make_batch()
    loss = cross_entropy_and(lambda logits: 1e-2 * logits.logsumexp(-1).square().mean())

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return loss(model(ids), labels)

    got = compiled(step, **FUSED, fallback="silent")(*batch.values())
    torch.testing.assert_close(got, step(*batch.values()), rtol=1e-5, atol=1e-5)
    assert metrics(model)["matched"] is True and "rewrite_values" in passes_of(model)


def test_verify() -> None:
    values = verified(tiny(), cross_entropy="fused").metrics()
    assert values["verify_steps"] == 1 and values["verify_max_error"] < 1e-5


def test_autocast() -> None:
    model, batch = tiny(), make_batch()
    compiled(model, **FUSED)
    with torch.autocast("cpu", torch.bfloat16):
        got = backward(model, model(**batch).loss)
        eager = hf_reference(model, batch, picks(model))
    exact = hf_reference(model, batch, picks(model))
    assert 1e-4 < overall(eager, exact) < 5e-2
    assert overall(got, exact) < 1.5 * overall(eager, exact)
