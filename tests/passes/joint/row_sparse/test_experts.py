"""The backward of experts from the selected tokens' pairs: equal to the dense one, and as small as it should be."""

from __future__ import annotations

import dataclasses

import models
import pytest
import torch
from row_sparse_comparison import compare
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cggr_compile import PersistentTRMLP
from cggr_compile.passes.joint.row_sparse import rules
from cggr_compile.passes.joint.row_sparse.rules.experts import ExpertsBackward, GatedExperts

MIXTRAL = dict(num_hidden_layers=1)


def call_with(batch):
    return lambda model: model(**batch).loss


@pytest.mark.parametrize(
    ("family", "batch", "options"),
    [
        ("mixtral", models.make_batch(), dict(kv_gradient="stop")),
        ("qwen3_moe", models.make_batch(1, 16), dict()),
        ("deepseek_v3", models.make_batch(1, 16), dict()),
        ("gpt_oss", models.make_batch(1, 16), dict()),
    ],
)
def test_nothing_is_made_dense(family, batch, options):
    record = compare(lambda: models.family(family, num_hidden_layers=2), call_with(batch), **options)
    assert record.details["densified"] == {}


@pytest.mark.slow
def test_fewer_candidates_than_slots():
    batch = models.make_batch(2, 16)
    batch["labels"][1, 3:] = -100
    compare(lambda: models.family("mixtral", **MIXTRAL), call_with(batch), min_tokens_ratio=0.6)


class Experts(nn.Module):
    """Half of the tokens go to no expert."""

    def __init__(self):
        super().__init__()
        self.layer = PersistentTRMLP(models.HIDDEN, 24, 4, 2)

    def forward(self, x):
        return self.layer(x, mask=x.detach()[..., 0] > 0)[0]


def decoder():
    torch.manual_seed(0)
    model = models.SlicedLoss()
    for block in model.blocks:
        block.up, block.down = nn.Identity(), Experts()
    return models.randomise(model)


def test_our_own_layer():
    batch = models.make_batch(ignored=False)
    seen = []

    def call(model):
        seen.append(model)
        return model(batch["input_ids"], batch["labels"])

    record = compare(decoder, call, kv_gradient="stop")
    assert "cggr.moe_mlp_backward.default" not in record.details["densified"]
    assert all(block.down.layer.metrics()["router_entropy"] > 0 for block in seen[0].blocks)


def sizes_of_backwards():
    """Rows of the gradient that every backward of experts gets."""
    model, batch = models.family("mixtral", **MIXTRAL), models.make_batch(2, 16)
    loss = models.compiled(model, min_tokens_ratio=0.25)(**batch).loss
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        loss.backward()
    return [event.input_shapes[0] for event in profiler.events() if event.name == "cggr::moe_mlp_backward"]


def test_only_selected_tokens_enter():
    assert sizes_of_backwards() == [[8, models.HIDDEN]]


BACKWARD = torch.ops.cggr.moe_mlp_backward.default


def test_the_check_can_fail(monkeypatch):
    monkeypatch.delitem(rules.RULES, BACKWARD)
    assert sizes_of_backwards() == [[32, models.HIDDEN]]


class OfOtherTokens(ExpertsBackward):
    """What gate and up gave for other tokens."""

    def apply(self, rv, node):
        flipped = rv.emit.call(torch.ops.aten.flip.default, self.inner, [0])
        ExpertsBackward.apply(dataclasses.replace(self, inner=flipped), rv, node)


class Wrong(GatedExperts):
    def carry(self, at, node):
        return OfOtherTokens(**vars(super().carry(at, node)))


def test_the_comparison_can_fail(monkeypatch):
    monkeypatch.setitem(rules.RULES, BACKWARD, Wrong())
    with pytest.raises(AssertionError):
        compare(lambda: models.family("mixtral", **MIXTRAL), call_with(models.make_batch()))
