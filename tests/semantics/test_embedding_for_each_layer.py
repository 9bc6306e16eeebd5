"""An embedding for each layer, as Gemma 4 has: it goes past the layers in front, to the same position."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from models import HIDDEN, VOCAB, compiled, make_batch, randomise
from torch import Tensor, nn
from training import check_against_reference, complaints, metrics

WIDTH, LAYERS = 8, 2


class Beside(models.PlainLM):
    """Every block ends with ``x + out(gelu(gate(x)) * beside)``; ``beside`` is looked up, and projected of ``x0``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(models.Layer(models.attend_sdpa, fused=False) for _ in range(LAYERS))
        self.each, self.project = nn.Embedding(VOCAB, LAYERS * WIDTH), nn.Linear(HIDDEN, LAYERS * WIDTH)
        self.gate = nn.ModuleList(nn.Linear(HIDDEN, WIDTH) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(LAYERS))
        randomise(self)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool | None = None) -> models.Output:
        x = self.wte(input_ids)
        beside = (self.each(input_ids) + self.project(x)).unflatten(-1, (LAYERS, WIDTH))
        for i, block in enumerate(self.blocks):
            x = block(x)
            x = x + self.out[i](F.gelu(self.gate[i](x)) * beside[:, :, i])
        logits = self.lm_head(self.ln_f(x))
        if labels is None:
            return models.Output(None, logits)
        target = F.pad(labels, (0, 1), value=models.IGNORE)[:, 1:]
        return models.Output(F.cross_entropy(logits.view(-1, VOCAB), target.reshape(-1)), logits)


@pytest.mark.parametrize(
    "mode", [{"kv_gradient": "project"}, pytest.param({"kv_gradient": "stop"}, marks=pytest.mark.slow)]
)
def test_routed(mode):
    torch.manual_seed(0)
    model = Beside()
    with complaints() as said:
        run = compiled(model, compiler="eager", min_tokens_ratio=0.25, gradient="routed", scoring="entropy", **mode)
        got = check_against_reference(run, make_batch(), **mode)
    assert metrics(run)["level"] == "routed" and not any("computes every position" in message for message in said)
    picked = got.grads["each.weight"].abs().sum(1) > 0
    assert 0 < picked.sum() <= 0.25 * 2 * models.SEQ + 2  # rows of selected positions alone
