"""``selection="spans"`` with what surrounds it: padding, other scorings, checks, a last block that is shorter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import SEQ, compiled, slow_but
from reference import assert_same, backward, candidates, hf_reference, shift
from training import check_against_reference, metrics, padded, picks, selected, small

SPANS: dict[str, Any] = {"selection": "spans", "span": 3, "min_tokens_ratio": 0.375}  # 6 slots: 2 blocks of 3
OTHERS: dict[str, dict[str, Any]] = {
    "scoring at random": {"scoring": "random"},
    "learned": {"scoring": "learned"},
    "verified": {"verify": 1, "gradient": "exact"},
    "fused head": {"cross_entropy": "fused", "scoring": "loss"},
    "whole batch": {"scope": "batch", "max_selected": 9},
}


@pytest.mark.parametrize("name", slow_but(["learned", "verified"], OTHERS))
def test_whole_blocks_with_padding(name: str) -> None:
    """16 positions are 5 blocks of 3 and one of 1; the first sequence has labels in 4 of them."""
    model, batch = small(num_hidden_layers=1), padded("right")
    compiled(model, **SPANS, **OTHERS[name])
    valid = candidates(shift(batch["labels"]))
    for _ in range(2):
        got = backward(model, model(**batch).loss)
        mode = {"gradient": "exact"} if name == "verified" else {}
        assert metrics(model)["matched"] is True, metrics(model)
        assert_same(got, hf_reference(model, batch, picks(model), **mode))
        for row, weights, has in zip(picks(model).rows, picks(model).weights, valid, strict=True):
            blocks = {position // 3 for position in row[row >= 0].tolist()}
            whole = [at for at in range(SEQ) if at // 3 in blocks and has[at]]
            assert row[row >= 0].tolist() == whole
            for block in blocks:
                assert len(set(weights[: len(whole)][row[: len(whole)] // 3 == block].tolist())) == 1
        if name != "whole batch":
            assert all(len({at // 3 for at in row.tolist() if at >= 0}) == 2 for row in selected(model))
    if name == "verified":
        assert metrics(model)["verify_max_error"] < 1e-5


@pytest.mark.slow
def test_a_sequence_shorter_than_a_span() -> None:
    """One block, of as many positions as there are slots: the share holds."""
    model, batch = small(num_hidden_layers=1), padded("left")
    compiled(model, selection="spans", min_tokens_ratio=0.25)
    check_against_reference(model, batch)
    rows = picks(model).rows
    assert rows.shape[1] == SEQ // 4 and all(len(set((row[row >= 0] // 4).tolist())) == 1 for row in rows)
    assert torch.isfinite(picks(model).weights).all()
