"""Mixture-of-Experts models: losses of the router, loops over experts, our own layer in somebody's decoder."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from models import HIDDEN, SEQ, VOCAB, compiled, make_batch
from reference import (
    Run,
    assert_same,
    backward,
    dense,
    eager_call,
    hard_mask,
    hf_reference,
    routing,
    selected_loss,
    shift,
    worst,
)
from torch import Tensor, nn
from training import RATIO, complaints, metrics, picks, small

import cggr_compile
from cggr_compile import PersistentTRMLP


def with_router_logits(name: str, **overrides: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = small(name, **{"router_aux_loss_coef": 2.0, "num_hidden_layers": 1, **overrides})
    batch = make_batch() | {"attention_mask": torch.ones(2, SEQ, dtype=torch.long), "output_router_logits": True}
    return model, batch


def with_aux_loss(model: nn.Module, batch: dict[str, Any], **mode: str) -> Run:
    """The selected loss, and the load-balancing loss over every token.

    A release of transformers that computes the second one in another graph needs the exact gradient of all routers.
    """
    chosen, target = picks(model), shift(batch["labels"])
    (routed,) = {r.record("route_gradient").matched for r in cggr_compile.runtime(model).reports if r.matched}
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with routing(model, hard_mask(chosen.rows, SEQ), "routed" if routed else "exact", "project"):
        out = eager_call(model, use_cache=False, **inputs)
        return backward(model, selected_loss(out.logits, target, chosen) + 2.0 * out.aux_loss)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_router_logits(name: str) -> None:
    model, batch = with_router_logits(name)
    compiled(model, min_tokens_ratio=RATIO)
    got = backward(model, model(**batch).loss)
    assert metrics(model)["level"] == "routed", metrics(model)
    assert_same(got, with_aux_loss(model, batch))
    chosen = picks(model)
    with routing(model, hard_mask(chosen.rows, SEQ), "routed", "project"):  # the check can fail
        logits = eager_call(model, use_cache=False, **batch).logits
        alone = backward(model, selected_loss(logits, shift(batch["labels"]), chosen))
    assert worst(got, alone)[0] > 1e-3


@pytest.mark.slow
def test_router_logits_without_a_mask() -> None:
    """Which breaks the graph in some releases of transformers: then it is reported."""
    model, batch = with_router_logits("mixtral")
    del batch["attention_mask"]
    compiled(model, min_tokens_ratio=RATIO, fallback="warn")
    with complaints() as found:
        got = backward(model, model(**batch).loss)
    matched, level = metrics(model)["matched"], metrics(model)["level"]
    assert_same(got, with_aux_loss(model, batch) if matched else dense(model, batch))
    assert level == "routed" or any("output_router_logits" in message for message in found), found


@pytest.mark.slow
def test_a_loop_over_experts_is_reported() -> None:
    model, batch = small("mixtral", num_hidden_layers=1, experts_implementation="eager"), make_batch()
    compiled(model, min_tokens_ratio=RATIO, fallback="warn")
    with complaints() as found:
        got = backward(model, model(**batch).loss)
    assert metrics(model)["level"] == "loss"  # of the piece behind the last layer
    assert any("loop over experts" in message for message in found), found
    assert_same(got, hf_reference(model, batch, picks(model), gradient="exact"))


class Experts(nn.Module):
    """The MLP of a block; what its router loses is collected in ``losses``."""

    def __init__(self, losses: list[Tensor], null: bool) -> None:
        super().__init__()
        self.layer, self.losses, self.null = PersistentTRMLP(HIDDEN, 24, 4, 2, aux_loss_weight=1.0), losses, null

    def forward(self, x: Tensor) -> Tensor:
        mask = x.detach()[..., 0] > 0 if self.null else None  # half of the tokens go to no expert
        y, aux_loss = self.layer(x, mask=mask)
        self.losses.append(aux_loss)
        return y


class Decoder(models.Decoder):
    """Returns cross-entropy plus the routers' losses."""

    def __init__(self, null: bool) -> None:
        super().__init__()
        self.losses: list[Tensor] = []
        for block in self.blocks:
            block.up, block.down = nn.Identity(), Experts(self.losses, null)
        models.randomise(self)

    def both(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        self.losses.clear()
        logits = super().forward(ids)
        aux_loss = torch.stack(self.losses).sum()
        self.losses.clear()
        return logits, aux_loss

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits, aux_loss = self.both(ids)
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)) + aux_loss


@pytest.mark.parametrize("null", [pytest.param(False, marks=pytest.mark.slow), True])
def test_our_own_layer_with_its_loss(null: bool) -> None:
    model, batch = Decoder(null), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    got = backward(model, model(batch["input_ids"], batch["labels"]))
    runtime = cggr_compile.runtime(model)
    assert runtime.metrics()["matched"] is True, runtime.metrics()
    chosen, target = picks(model), shift(batch["labels"])
    with routing(model, hard_mask(chosen.rows, SEQ), "routed", "project"):
        logits, aux_loss = model.both(batch["input_ids"])
        assert_same(got, backward(model, selected_loss(logits, target, chosen) + aux_loss))
    assert all(block.down.layer.metrics()["aux_loss"] > 0 for block in model.blocks)
