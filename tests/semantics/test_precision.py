"""Autocast and half-precision weights: no further from float32 than eager mode is."""

from __future__ import annotations

import copy

import pytest
import torch
from models import compiled, family, make_batch
from reference import backward, hf_reference, overall
from training import RATIO, metrics, picks, small


@pytest.mark.parametrize(
    ("mode", "compiler"),
    [("exact", "eager"), ("routed", "eager"), pytest.param("routed", "inductor", marks=pytest.mark.slow)],
)
def test_autocast(mode: str, compiler: str) -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, gradient=mode, compiler=compiler)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    assert loss.dtype == torch.float32
    got = backward(model, loss)
    assert metrics(model)["matched"] is True, metrics(model)
    chosen = picks(model)
    full_precision = hf_reference(model, batch, chosen, gradient=mode)
    with torch.autocast("cpu", torch.bfloat16):
        eager = hf_reference(model, batch, chosen, gradient=mode)
    assert abs(got.loss - eager.loss) < 2e-2 * abs(eager.loss)
    rounding = overall(eager, full_precision)
    assert 1e-4 < rounding < 5e-2, "autocast did nothing, or the reference is unusable"
    assert overall(got, full_precision) < 1.5 * rounding, (overall(got, full_precision), rounding)
    other = hf_reference(model, batch, chosen, gradient="routed" if mode == "exact" else "exact")
    assert overall(got, other) > 3 * rounding


def test_bf16_weights() -> None:
    model, batch = family("llama").to(torch.bfloat16), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    got = backward(model, model(**batch).loss)
    assert metrics(model)["matched"] is True, metrics(model)
    assert {g.dtype for g in got.grads.values()} == {torch.bfloat16}
    eager = hf_reference(model, batch, picks(model))
    exact = hf_reference(copy.deepcopy(model).float(), batch, picks(model))
    assert overall(got, exact) < 1.5 * overall(eager, exact)
