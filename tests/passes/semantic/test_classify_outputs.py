"""What every differentiable output is taken for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured
from models import VOCAB
from torch import Tensor

from cggr_compile.passes.facts import Outputs


class Caching(models.Decoder):
    """Collects what attention sees: queries, keys and values [B, heads, S, D] of every block, and hidden states."""

    def __init__(self) -> None:
        super().__init__(self.attend, fused=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        self.seen.append((q, k, v))
        return models.attend_sdpa(q, k, v)

    def forward(self, ids: Tensor) -> Any:
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        seen, self.seen = self.seen, []
        return self.lm_head(self.ln_f(states[-1])), states, seen


CASES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "logits": (
        lambda loss, z, x, s: (loss, z, z.view(-1, VOCAB), z.half(), z[:, -1], z * 2),
        ["loss", *["logits"] * 5],
    ),
    "loss of any shape": (
        lambda loss, z, x, s: (loss, loss[None], torch.stack([loss, x[0].sum()]), loss * x[1]),
        ["loss"] * 4,
    ),
    "states": (lambda loss, z, x, s: (loss, x[0], x[2], x[2].mean()), ["loss", *["kept"] * 3]),
    "cache": (lambda loss, z, x, s: (loss, s[1][1], s[1][2]), ["loss", "cache", "cache"]),
    "cache that grows": (
        lambda loss, z, x, s: (loss, torch.cat([s[0][1].new_empty(2, 4, 0, 8), s[0][1]], 2), s[0][2].transpose(1, 2)),
        ["loss", "cache", "cache"],
    ),
    "cache in one tensor": (lambda loss, z, x, s: (loss, torch.stack([s[0][1], s[0][2]])), ["loss", "cache"]),
    "keys alone": (lambda loss, z, x, s: (loss, s[1][1]), ["loss", "kept"]),
    "keys and values of two blocks": (lambda loss, z, x, s: (loss, s[1][1], s[2][2]), ["loss", "kept", "kept"]),
    "queries": (lambda loss, z, x, s: (loss, s[1][0]), ["loss", "kept"]),
    "computed from a cache": (
        lambda loss, z, x, s: (loss, s[1][1], s[1][2], s[1][1].square()),
        ["loss", "cache", "cache", "kept"],
    ),
    "part of the loss": (lambda loss, z, x, s: ((e := x[1].square().mean()) + loss, e), ["loss", "part"]),
    "not a part: detached": (lambda loss, z, x, s: ((e := x[1].mean()).detach() + loss, e), ["loss", "kept"]),
    "not a part: several": (lambda loss, z, x, s: ((e := x[1].mean((1, 2))).sum() + loss, e), ["loss", "kept"]),
    "no gradient": (lambda loss, z, x, s: (loss, x[1].detach(), z.argmax(-1)), ["loss"]),
}


@pytest.mark.parametrize("name", CASES)
def test_kinds(name: str, batch: dict[str, Tensor]) -> None:
    results, kinds = CASES[name]
    decoder = Caching()

    def step(ids: Tensor, labels: Tensor) -> Any:
        logits, states, seen = decoder(ids)
        return results(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits, states, seen)

    captured = Captured(step, *batch.values())
    result = captured.run("classify_outputs")
    assert list(captured.ctx[Outputs].kinds.values()) == kinds
    assert result.matched == ("kept" in kinds)
    objective = [kinds[i] for i in captured.ctx[Outputs].objective]
    assert set(objective) <= {"loss", "kept"} and objective.count("loss") == kinds.count("loss")


@pytest.mark.parametrize(
    ("read", "dense"),
    [
        (lambda x, s: x[0], set()),
        (lambda x, s: x[2], {0, 1}),
        (lambda x, s: s[2][1], {0, 1, 2}),
        (lambda x, s: x[2].detach() * x[1], {0}),
        (lambda x, s: x[4].mean(), {0, 1, 2, 3}),
    ],
)
def test_blocks_on_the_way(read: Callable[..., Tensor], dense: set[int], batch: dict[str, Tensor]) -> None:
    decoder = Caching()

    def step(ids: Tensor, labels: Tensor) -> Any:
        logits, states, seen = decoder(ids)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), read(states, seen)

    captured = Captured(step, *batch.values())
    captured.run("route_gradient")
    assert captured.ctx[Outputs].dense_blocks == dense
    assert captured.ctx[Outputs].every_position == bool(dense)
    assert len(captured.ctx.warnings) == bool(dense)
    markers = captured.gm.graph.find_nodes(op="call_function", target=torch.ops.cggr.detach_unselected.default)
    assert len(markers) == 4 - len(dense)
