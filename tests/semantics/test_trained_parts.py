"""Models of which only a part is trained."""

from __future__ import annotations

import models
import pytest
from models import compiled, make_batch
from reference import assert_same, backward, hf_reference
from training import RATIO, check_against_reference, metrics, picks, small

MODES = [{"gradient": "exact"}, {"kv_gradient": "stop"}, {"kv_gradient": "project"}]


@pytest.mark.parametrize("mode", models.slow_but(MODES[1:], MODES), ids=str)
def test_lora(mode: dict[str, str]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], lora_dropout=0.0)
    model = peft.get_peft_model(small(), config)
    models.randomise(model)
    batch = make_batch()
    compiled(model, min_tokens_ratio=RATIO, **mode)
    got = backward(model, model(**batch).loss)
    assert metrics(model)["matched"] is True, metrics(model)
    assert len(got.grads) == 2 * 2 * 4
    assert_same(got, hf_reference(model, batch, picks(model), **mode))


def test_frozen_parameters() -> None:
    """Only the last block trains: nothing of the rest gets a gradient."""
    model, batch = small(), make_batch()
    model.requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    compiled(model, min_tokens_ratio=RATIO)
    check_against_reference(model, batch)
