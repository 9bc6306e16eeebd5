"""``top_entropy_quantile``: a loss that leaves out all but the highest entropies, on rows chosen by these."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import compiled
from reference import assert_same, backward
from token_losses import ADVANTAGE, IDS, TARGET, Model, expected, open_gate, picks_of
from training import metrics

import cggr_compile
from cggr_compile.runtime import FallbackWarning

SHARE = 0.25
LABELS = TARGET.masked_fill(torch.arange(IDS.shape[1]) < IDS.shape[1] // 2, -100)  # answers behind prompts


def of_head(model: Model, labels: torch.Tensor = LABELS) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies, [B, S - 1], as TRL's fused head gives them."""
    found = cggr_compile.token_log_probs(
        model.hidden(IDS)[:, :-1],
        model.lm_head.weight,
        labels[:, :-1],
        temperature=0.8,
        outputs=("log_prob", "entropy"),
    )
    return found.log_prob, found.entropy


def of_logits(model: Model, gate: Any = open_gate) -> tuple[torch.Tensor, torch.Tensor]:
    logs = (gate(model.lm_head(model.hidden(IDS))) / 0.8)[:, :-1].log_softmax(-1)
    known = LABELS[:, :-1] != -100
    log_prob = logs.gather(-1, LABELS[:, :-1].clamp_min(0)[..., None])[..., 0] * known
    return log_prob, -(logs.exp() * logs).sum(-1) * known


def outside(log_prob: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """The loss of what a trainer keeps, which no graph sees."""
    mask = LABELS[:, :-1] != -100
    kept = mask & (entropy >= torch.quantile(entropy[mask], 1.0 - SHARE))
    return -(log_prob * ADVANTAGE * kept).sum() - 0.1 * (entropy * kept).mean()


OPTIONS: dict[str, Any] = {
    "selection": "labels",
    "max_selected": 1.0,
    "gradient": "exact",
    "top_entropy_quantile": SHARE,
}


def test_equals_the_loss_of_every_position() -> None:
    """With slots for all that are kept the gradient is the whole one, though few rows carry it."""
    model = Model()
    step = compiled(lambda: of_head(model), **OPTIONS)
    got = backward(model, outside(*step()))
    assert_same(got, backward(model, outside(*of_logits(model))))
    figures, candidates = metrics(model), int((LABELS[:, :-1] != -100).sum())
    assert figures["level"] == "routed" and figures["labels_overflow"] == 0
    kept = int(SHARE * candidates)
    assert kept <= figures["tokens_selected"] == figures["tokens_total"] <= kept + 3 < candidates / 2


def test_gradient_of_the_rows() -> None:
    """Routed, with fewer slots than the fullest sequence needs: what is dropped is counted and weighted."""
    model = Model()
    options = {**OPTIONS, "gradient": "routed", "context": 0, "max_selected": 1}
    got = backward(model, outside(*compiled(lambda: of_head(model), **options)()))
    figures, picks = metrics(model), picks_of(model)
    assert figures["labels_overflow"] == figures["tokens_total"] - figures["tokens_selected"] > 0
    assert picks.weights.max() > 1
    want = expected(model, lambda gate: outside(*of_logits(model, gate)), picks, "routed")
    assert_same(got, want)


def test_slots_of_the_first_batch(caplog: pytest.LogCaptureFixture) -> None:
    """``auto`` counts a share of the labels, half as many again of the fullest sequence."""
    model = Model()
    options = {"top_entropy_quantile": SHARE, "context": 0, "selection": "auto"}
    with caplog.at_level(logging.WARNING):
        outside(*compiled(lambda: of_head(model), **options)()).backward()
    assert "have a label and an entropy among the highest" in caplog.text
    rows = cggr_compile.runtime(model).selected.shape[1]
    most = int((LABELS[:, :-1] != -100).sum(1).max())
    assert SHARE * most < rows < most and metrics(model)["selection"] == "labels"


def test_without_entropies_it_does_nothing() -> None:
    model = Model()

    def loss() -> torch.Tensor:
        return F.cross_entropy(model.lm_head(model.hidden(IDS)).flatten(0, 1), LABELS.flatten())

    with pytest.warns(FallbackWarning, match=r"top_entropy_quantile=0.25 does nothing: the loss is one cross-entropy"):
        compiled(loss, fallback="warn", **OPTIONS)().backward()
    figures = metrics(model)
    assert figures["level"] == "routed" and figures["tokens_total"] == (LABELS != -100).sum()
