"""``kv_weight="1/sqrt(p)"``: the gradient into keys and values of a selected position, weighed."""

from __future__ import annotations

import pytest
import torch
from models import compiled, make_batch
from reference import assert_same, backward, hf_reference, worst
from row_sparse_comparison import compare
from training import RATIO, metrics, picks, small

WEIGHED = "1/sqrt(p)"


@pytest.mark.parametrize(
    ("kv_gradient", "row_sparse"),
    [
        ("stop", True),
        ("project", True),
        pytest.param("stop", False, marks=pytest.mark.slow),
        pytest.param("project", False, marks=pytest.mark.slow),
    ],
)
def test_against_the_reference(kv_gradient: str, row_sparse: bool) -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, kv_gradient=kv_gradient, kv_weight=WEIGHED, row_sparse=row_sparse)
    got = backward(model, model(**batch).loss)
    assert metrics(model)["matched"] is True, metrics(model)
    chosen = picks(model)
    assert_same(got, hf_reference(model, batch, chosen, kv_gradient=kv_gradient, kv_weight=WEIGHED))
    unweighed = hf_reference(model, batch, chosen, kv_gradient=kv_gradient)
    assert worst(got, unweighed)[0] > 0.01, "a check that cannot fail"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_unused_slots(family: str) -> None:
    """Fewer candidates than slots, weights that differ, K and V from one product: still what the dense backward has."""
    batch = make_batch()
    batch["labels"][1, 3:] = -100
    one = {"llama": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}}[family]
    record = compare(lambda: small(family, **one), lambda m: m(**batch).loss, kv_weight=WEIGHED, min_tokens_ratio=0.6)
    if family == "llama":
        assert record.details["densified"] == {} and not record.details["dense_attention"]


def test_in_bfloat16() -> None:
    """The factor is multiplied in float32: the gradients keep the model's dtype."""
    model, batch = small().bfloat16(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, kv_weight=WEIGHED)
    model(**batch).loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
