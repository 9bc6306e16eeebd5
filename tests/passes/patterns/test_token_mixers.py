"""What mixes tokens beside attention is found, and gated; where it is not, that is told."""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured
from models import HIDDEN, SEQ, VOCAB, compiled, make_batch
from torch import Tensor, nn
from training import RATIO, complaints, metrics, selected

from cggr_compile.passes.facts import LayerStack


def causal_conv(mixer: Mixer, x: Tensor) -> Tensor:
    return mixer.conv(F.pad(x.mT, (mixer.conv.kernel_size[0] - 1, 0))).mT


def linear_attention(mixer: Mixer, x: Tensor) -> Tensor:
    scores = (mixer.a(x) @ mixer.b(x).mT).tril()
    return scores @ x / SEQ


# what mixes, and whether it does
MIXERS: dict[str, tuple[Callable[[Mixer, Tensor], Tensor], bool]] = {
    "conv1d": (causal_conv, True),
    "cumsum": (lambda m, x: m.a(x).cumsum(1) / SEQ, True),
    "cumsum of features": (lambda m, x: m.a(x).cumsum(-1), False),
    "linear attention": (linear_attention, True),
    "token shift": (lambda m, x: m.a(F.pad(x, (0, 0, 1, -1))), True),
    "concatenated shift": (lambda m, x: m.a(torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)), True),
    "windows": (lambda m, x: m.a(F.pad(x.mT, (2, 0)).unfold(-1, 3, 1).mean(-1).mT), True),
    "mean": (lambda m, x: m.a(x.mean(dim=1, keepdim=True)), True),
    "roll": (lambda m, x: m.a(x).roll(1, dims=1), True),
    "flip of features": (lambda m, x: m.a(x).flip(-1), False),
    "gate": (lambda m, x: m.a(x).sigmoid() * m.b(x), False),
    "softmax of features": (lambda m, x: m.a(x).softmax(-1), False),
}


class Mixer(nn.Module):
    def __init__(self, mix: Callable[[Mixer, Tensor], Tensor], kernel: int = 3) -> None:
        super().__init__()
        self.mix = mix
        self.a, self.b = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, kernel, groups=HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self, x)


class Hybrid(models.Decoder):
    """A mixer in front of the blocks named: 0 is before the first attention, 2 inside of the second block."""

    def __init__(self, mix: Callable[[Mixer, Tensor], Tensor], places: tuple[int, ...] = (2,), kernel: int = 3) -> None:
        super().__init__(layers=3)
        self.mixers = nn.ModuleDict({str(i): Mixer(mix, kernel) for i in places})
        models.randomise(self)

    def forward(self, ids: Tensor, labels: Tensor, hidden: Tensor | None = None) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        x = x if hidden is None else x + hidden
        for i, block in enumerate(self.blocks):
            if str(i) in self.mixers:
                x = self.mixers[str(i)](x)
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


def mixers(model: nn.Module, **options: str) -> tuple[dict[str, str], dict[str, str]]:
    """What mixes behind a gate, by module, and without one."""
    captured = Captured(model, *make_batch().values(), options=options)
    result = captured.run("route_gradient")
    assert result.matched
    found = [block.mixer for block in captured.ctx[LayerStack].blocks if block.mixer is not None]
    return {mixer.name: mixer.kind for mixer in found}, result.details.get("mixers", {})


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_are_found(name: str) -> None:
    mix, mixing = MIXERS[name]
    found, leaks = mixers(Hybrid(mix))
    assert {place.removesuffix(".conv") for place in found} == ({"mixers.2"} if mixing and name != "roll" else set())
    assert bool(leaks) == (name == "roll")  # positions in another order are told


def test_a_convolution_of_one_position_mixes_nothing() -> None:
    assert mixers(Hybrid(causal_conv, kernel=1)) == ({}, {})


def test_a_mixer_before_the_first_attention() -> None:
    found, leaks = mixers(Hybrid(causal_conv, (0, 2)))
    assert found == {"mixers.0.conv": "convolution", "mixers.2.conv": "convolution"} and not leaks


@pytest.mark.parametrize("kv_gradient", ["project", "stop"])
def test_what_is_behind_a_marker_is_stopped(kv_gradient: str) -> None:
    """A convolution of the keys: a gate in front of it, and with ``stop`` one at the keys as well."""

    class Convolved(models.Layer):
        def __init__(self) -> None:
            super().__init__(models.attend_sdpa, fused=False)
            self.k = nn.Sequential(self.k, Mixer(causal_conv))

    model = models.Decoder()
    model.blocks[1] = Convolved()

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())

    found, leaks = mixers(step, kv_gradient=kv_gradient)  # type: ignore[arg-type]
    assert list(found.values()) == ["convolution"] and not leaks


@pytest.mark.parametrize("name", ["cumsum", "gate"])
def test_the_gradient_says_the_same(name: str) -> None:
    """Rows that are not selected get no gradient in front of a mixer either, and there is nothing to tell."""
    model, batch = Hybrid(MIXERS[name][0]), make_batch()
    hidden = torch.zeros(2, SEQ, HIDDEN, requires_grad=True)
    run = compiled(lambda: model(*batch.values(), hidden), min_tokens_ratio=RATIO, gradient="routed")
    with complaints() as found:
        run().backward()
    assert metrics(model)["matched"] is True
    chosen = torch.zeros(2, SEQ, dtype=torch.bool)
    for row, mask in zip(selected(model).tolist(), chosen, strict=True):
        mask[[i for i in row if i >= 0]] = True
    assert hidden.grad[chosen].any() and not hidden.grad[~chosen].any()
    assert not any("mixed without attention" in message for message in found), found


def test_a_mixer_in_front_of_the_stream_is_told() -> None:
    """Before two embeddings join there is no residual stream that gradient could be stopped in front of."""

    class Joined(Hybrid):
        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            x = self.wte(ids) + self.wpe(ids % 64).cumsum(1) / SEQ
            for block in self.blocks:
                x = block(x)
            return F.cross_entropy(self.lm_head(self.ln_f(x)).flatten(0, 1), labels.flatten())

    model, batch = Joined(causal_conv, ()), make_batch()
    run = compiled(model, min_tokens_ratio=RATIO, gradient="routed")
    with complaints() as found:
        run(*batch.values()).backward()
    assert any("tokens are mixed without attention: cumsum in" in message for message in found), found
