"""Several attentions side by side in a block, and values that go past blocks to the same position of later ones."""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch
import torch.nn.functional as F
from models import HIDDEN, IGNORE, VOCAB, compiled, make_batch, randomise
from reference import assert_same, hf_reference, worst
from torch import Tensor, nn
from training import backward, metrics, picks

import cggr_compile


def differential(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """One map of scores for either half of the values' features: two calls that share queries and keys."""
    k, v = models.keys_values(k, v)
    left, right = (F.scaled_dot_product_attention(q, k, half, is_causal=True) for half in v.chunk(2, dim=-1))
    return torch.cat([left - 0.3 * right, right], dim=-1)


def biased(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Written out, with a bias that each query computes of itself, and a sink: one more score without a value."""
    k, v = models.keys_values(k, v)
    size = q.shape[2]
    distance = torch.arange(size)[:, None] - torch.arange(size)
    bias = q.tanh().gather(-1, (distance.clamp(min=0) % q.shape[-1]).expand(*q.shape[:2], -1, -1))
    scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
    scores = scores.masked_fill(distance < 0, float("-inf"))
    weights = torch.cat([scores, q.mean(-1, keepdim=True)], dim=-1).softmax(-1)[..., :-1]
    return weights @ v


class Plain(models.PlainLM):
    """Blocks with this attention, one after the other."""

    def __init__(self, attend: Callable[..., Tensor] = models.attend_softmax) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(models.Layer(attend, fused=False) for _ in range(2))
        randomise(self)

    def states(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool | None = None) -> models.Output:
        logits = self.lm_head(self.ln_f(self.states(self.wte(input_ids))))
        if labels is None:
            return models.Output(None, logits)
        target = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
        return models.Output(F.cross_entropy(logits.view(-1, VOCAB), target.reshape(-1)), logits)


class Reminded(Plain):
    """Attention in every layer sees the embedding beside the stream."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.ln_1 = nn.LayerNorm(2 * HIDDEN)
            block.q, block.k, block.v = (nn.Linear(2 * HIDDEN, HIDDEN, bias=False) for _ in range(3))
        randomise(self)

    def states(self, x: Tensor) -> Tensor:
        first = x
        for block in self.blocks:
            h = block.ln_1(torch.cat([x, first], dim=-1))
            gated = models.kv_input(h)
            q, k, v = (models.split_heads(t) for t in (block.q(h), block.k(gated), block.v(gated)))
            x = x + block.out(block.attend(q, k, v).transpose(1, 2).reshape(x.shape))
            x = x + block.down(F.gelu(block.up(block.ln_2(x))))
        return x


class Waiting(Plain):
    """Two states by turns: one waits while a layer works on the sum of both."""

    def states(self, x: Tensor) -> Tensor:
        slow, fast = x, torch.zeros_like(x)
        for _ in range(2):
            fast = self.blocks[0](slow + fast)
            slow = self.blocks[1](slow + fast)
        return slow


class Shared(Plain):
    """The second layer attends to the keys and values of the first."""

    def states(self, x: Tensor) -> Tensor:
        keys = values = None
        for block in self.blocks:
            h = block.ln_1(x)
            if keys is None:
                gated = models.kv_input(h)
                keys, values = models.split_heads(block.k(gated)), models.split_heads(block.v(gated))
            x = x + block.out(
                block.attend(models.split_heads(block.q(h)), keys, values).transpose(1, 2).reshape(x.shape)
            )
            x = x + block.down(F.gelu(block.up(block.ln_2(x))))
        return x


MODELS: dict[str, Callable[[], Plain]] = {
    "differential": lambda: Plain(differential),
    "biased": lambda: Plain(biased),
    "reminded": Reminded,
    "waiting": Waiting,
    "shared": Shared,
}
QUICK = [
    ("differential", "stop"),
    ("reminded", "project"),
    ("waiting", "stop"),
    ("biased", "project"),
    ("shared", "project"),
]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=() if (name, mode) in QUICK else pytest.mark.slow)
        for name in MODELS
        for mode in ("stop", "project")
    ],
)
def test_routed(name: str, mode: str) -> None:
    model, batch = MODELS[name](), make_batch(seq=12)
    compiled(model, compiler="eager", min_tokens_ratio=0.25, gradient="routed", kv_gradient=mode)
    got = backward(model, model(**batch).loss)
    assert metrics(model)["level"] == "routed", metrics(model)
    assert_same(got, hf_reference(model, batch, picks(model), gradient="routed", kv_gradient=mode))
    assert worst(got, hf_reference(model, batch, picks(model), gradient="exact"))[0] > 1e-3  # the check can fail
    (report,) = cggr_compile.runtime(model).reports
    assert "mixers" not in report.record("route_gradient").details
    read = got.grads["wte.weight"].abs().sum(1) > 0
    assert 0 < read.sum() <= (picks(model).rows >= 0).sum()  # rows of selected positions alone
