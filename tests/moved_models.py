"""Decoders with grad modes, autocast and writes between their parts: what the router needs stands on the other side."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, VOCAB, SEQ = 16, 32, 8
SEEDS = int(os.environ.get("CGGR_TEST_SEEDS", "6"))  # more of them for a hunt
ALL_LABELS = {"selection": "labels", "max_selected": 1.0, "gradient": "exact"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(HIDDEN, 24), nn.Linear(24, HIDDEN)
        self.before, self.between = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)

    def keys(self, y: Tensor) -> Tensor:
        return self.k(y).unflatten(-1, (2, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, v = (layer(y).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.v))
        attended = F.scaled_dot_product_attention(q, self.keys(y), v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Model(nn.Module):
    """A decoder of which a test replaces a part."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.register_buffer("level", torch.ones(2))

    def stack(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))

    def targets(self, labels: Tensor) -> Tensor:
        return labels

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.stack(self.table(ids))
        logits = self.logits(x)
        labels = self.targets(labels)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


VARIANTS: dict[str, Callable[[], nn.Module]] = {}
# what is known about a variant: why its graph stays dense, or its router is left out
DENSE: dict[str, str] = {}
UNROUTED: dict[str, str] = {}


def variant(make: Callable[[], nn.Module], *, dense: str = "", unrouted: str = "") -> Callable[[], nn.Module]:
    VARIANTS[make.__name__] = make
    if dense:
        DENSE[make.__name__] = dense
    if unrouted:
        UNROUTED[make.__name__] = unrouted
    return make


def but(**facts: str) -> Callable[[Any], Any]:
    return lambda make: variant(make, **facts)


@variant
class HeadTimesDetachedFactor(Model):
    def logits(self, x):
        h = self.norm(x)
        with torch.no_grad():
            factor = self.head.weight.norm(dim=1, keepdim=True).reciprocal()
        return F.linear(h, 4 * self.head.weight * factor)


@variant
class FrozenFirstBlockAndScaledHead(Model):
    def stack(self, x):
        with torch.no_grad():
            x = self.blocks[0](x)
        return self.blocks[2](self.blocks[1](x))

    def logits(self, x):
        return F.linear(self.norm(x), self.head.weight * 3)


@variant
class FrozenBySetGradEnabled(Model):
    def stack(self, x):
        torch.set_grad_enabled(False)
        x = self.blocks[0](x)
        torch.set_grad_enabled(True)
        return self.blocks[2](self.blocks[1](x))

    def logits(self, x):
        return F.linear(self.norm(x), self.head.weight + self.table.weight)


@variant
class FrozenBlocksAndScaledHead(Model):
    def stack(self, x):
        with torch.no_grad():
            x = super().stack(x)
        return x

    def logits(self, x):
        return F.linear(self.norm(x), self.head.weight * 3)


@variant
class FrozenTrunkWithItsNorm(Model):
    def logits(self, x):
        with torch.no_grad():
            h = self.norm(x)
        return F.linear(h, self.head.weight * 3)


@variant
class GradAgainInsideNoGrad(Model):
    def logits(self, x):
        h = self.norm(x)
        with torch.no_grad():
            size = self.head.weight.abs().amax()
            with torch.enable_grad():
                weight = self.head.weight * 2
            weight = weight if torch.is_grad_enabled() else weight / size
            detached = weight + 1
        return F.linear(h, self.head.weight + detached)


@variant
class InferenceFront(Model):
    def stack(self, x):
        with torch.inference_mode():
            x = self.blocks[0](x)
        return self.blocks[2](self.blocks[1](x.clone()))

    def logits(self, x):
        return F.linear(self.norm(x), self.head.weight * 3)


@variant
class InferenceFrontWithEmbedding(InferenceFront):
    def forward(self, ids, labels):
        with torch.inference_mode():
            x = self.blocks[0](self.table(ids))
        logits = self.logits(self.blocks[2](self.blocks[1](x.clone())))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@but(unrouted="normalize")
def spectral_norm_head():
    model = Model()
    nn.utils.parametrizations.spectral_norm(model.head)
    return model


@variant
def spectral_norm_in_every_block():
    model = Model()
    for block in model.blocks:
        nn.utils.parametrizations.spectral_norm(block.up)
    return model


@variant
def weight_norm_head_and_blocks():
    model = Model()
    for layer in (model.head, model.blocks[0].out, model.blocks[2].down):
        nn.utils.parametrizations.weight_norm(layer)
    return model


@variant
def orthogonal_projection():
    model = Model()
    nn.utils.parametrizations.orthogonal(model.blocks[1].q)
    nn.utils.parametrizations.orthogonal(model.head, use_trivialization=False)
    return model


@variant
class HeadFromOtherWeights(Model):
    def logits(self, x):
        return F.linear(self.norm(x), self.table.weight @ self.blocks[2].q.weight + self.head.weight)


@but(unrouted="computed later")
class HeadFromHiddenStates(Model):
    def logits(self, x):
        return F.linear(self.norm(x), self.head.weight * x.mean().sigmoid())


@but(unrouted="random numbers")
class RandomHead(Model):
    def logits(self, x):
        return F.linear(self.norm(x), self.head.weight * (torch.rand_like(self.head.weight) < 0.7))


@variant
class ShiftedNormWeight(Model):
    def logits(self, x):
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.norm.weight)
        return self.head(h)


@variant
class ShiftedNormWeightDetached(Model):
    def logits(self, x):
        with torch.no_grad():
            shift = 1 + self.norm.weight
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (self.norm.weight * shift)
        return self.head(h)


@variant
class DetachedNormScale(Model):
    def logits(self, x):
        with torch.no_grad():
            scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.head(x * scale * self.norm.weight)


@variant
class CloneUnderNoGrad(Model):
    """The head learns, the blocks do not."""

    def logits(self, x):
        with torch.no_grad():
            x = x.clone()
        return self.head(self.norm(x))


@variant
class BufferBeforeTheBlocks(Model):
    def forward(self, ids, labels):
        self.level.mul_(1.5)
        return super().forward(ids, labels)

    def logits(self, x):
        return F.linear(self.norm(x), self.head.weight * self.level[0])


@but(unrouted="add")
class BufferBetweenBlocks(Model):
    def stack(self, x):
        x = self.blocks[1](self.blocks[0](x))
        self.level.add_(1)
        return self.blocks[2](x)

    def logits(self, x):
        return F.linear(self.norm(x), self.head.weight * self.level[0])


@but(unrouted="mul")
class BufferThroughAView(Model):
    def logits(self, x):
        self.level.view(-1)[1:].mul_(3)
        return F.linear(self.norm(x), self.head.weight * self.level[1].clone())


@variant
class BufferAfterTheHead(Model):
    def logits(self, x):
        logits = F.linear(self.norm(x), self.head.weight * self.level[0].clone())
        self.level.add_(1)
        return logits


@but(unrouted="mul")
class WeightScaledInPlaceUnderNoGrad(Model):
    def logits(self, x):
        weight = self.head.weight + 0
        with torch.no_grad():
            weight.mul_(2)
        return F.linear(self.norm(x), weight)


@but(dense="writes in place")
class StreamScaledInPlaceUnderNoGrad(Model):
    def stack(self, x):
        x = self.blocks[0](x)
        with torch.no_grad():
            x.mul_(0.5)
        return self.blocks[2](self.blocks[1](x))


@variant
class AutocastBlocks(Model):
    def stack(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().stack(x)


@variant
class AutocastHead(Model):
    def logits(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(self.norm(x), self.table.weight @ self.blocks[2].q.weight + self.head.weight)


@variant
class AutocastWeightOnly(Model):
    def logits(self, x):
        h = self.norm(x)
        with torch.autocast("cpu", torch.bfloat16):
            weight = self.table.weight @ self.blocks[2].q.weight
        return F.linear(h, self.head.weight + weight)


@variant
class NoAutocastInside(Model):
    def stack(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.blocks[0](x)
            with torch.autocast("cpu", enabled=False):
                x = self.blocks[1](x.float())
            return self.blocks[2](x)

    def logits(self, x):
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            return F.linear(self.norm(x.float()), self.head.weight @ self.blocks[1].q.weight)


@variant
class NoGradInsideAutocast(Model):
    def stack(self, x):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            with torch.no_grad():
                x = self.blocks[0](x)
            return self.blocks[2](self.blocks[1](x))

    def logits(self, x):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            shift = self.table.weight @ self.blocks[2].q.weight
        return F.linear(self.norm(x), self.head.weight + shift.float())


@variant
class KeysWithoutGradient(Model):
    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.keys = lambda y, k=block.k: _detached(k, y)


def _detached(layer, y):
    with torch.no_grad():
        return layer(y).unflatten(-1, (2, -1)).transpose(1, 2)


@variant
class LabelsMappedUnderNoGrad(Model):
    def targets(self, labels):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return torch.where(labels < 3, -100, labels)


@variant
class LabelsThroughFloats(Model):
    def targets(self, labels):
        with torch.autocast("cpu", torch.bfloat16):
            one = torch.ones(1, 1)
            return ((labels.float().unsqueeze(-1) @ one).squeeze(-1) + 0.25).long()


@but(dense="setitem")
class LabelsWrittenLate(Model):
    def targets(self, labels):
        labels.view(-1)[2:5] = -100
        return labels


@variant
class LabelsWrittenEarly(Model):
    def forward(self, ids, labels):
        labels[:, 3:5].fill_(-100)
        return super().forward(ids, labels)


@variant
class LabelsWrittenAfterTheLoss(Model):
    def forward(self, ids, labels):
        loss = super().forward(ids, labels)
        labels[:, 3:5].fill_(-100)
        return loss


@variant
class SavedTensorHooksDisabled(Model):
    def stack(self, x):
        with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
            return super().stack(x)

    def logits(self, x):
        return F.linear(self.norm(x), self.head.weight * 2)
