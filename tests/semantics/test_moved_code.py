"""Code in other modes and between writes: nothing that is moved, copied or inserted may change loss or gradients.

Every model here trains on all its labels with ``gradient="exact"``: it must be the model that plain PyTorch runs.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import slow_but
from moved_models import (
    ALL_LABELS,
    DENSE,
    SEEDS,
    SEQ,
    UNROUTED,
    VARIANTS,
    VOCAB,
    Model,
)
from reference import assert_same, backward, eager_call
from torch import Tensor, nn
from training import complaints, metrics

import cggr_compile


def compare(make: Callable[[], nn.Module], tolerance: float = 1e-5, **options: Any) -> tuple[nn.Module, list[str]]:
    """The compiled model beside a twin that plain PyTorch runs, on the same batches; what the user was told."""
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    model.compile(backend="cggr", options={"compiler": "eager", **ALL_LABELS, **options})
    generator = torch.Generator().manual_seed(1)
    with complaints() as heard:
        for step in range(2):  # buffers have moved on at the second
            ids = torch.randint(0, VOCAB, (2, SEQ), generator=generator)
            labels = ids.clone()
            labels[0, :2] = -100
            runs = []
            for each, call in ((model, model), (twin, lambda *args: eager_call(twin, *args))):
                torch.manual_seed(step)
                mine = labels.clone()
                runs.append((backward(each, call(ids.clone(), mine)), mine))
            (got, written), (want, wanted) = runs
            assert_same(got, want, tolerance)
            assert torch.equal(written, wanted)
    for (name, mine), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=f"buffer {name}")
    return model, heard


# of each kind of place one: modes that stop a gradient, that cast or that nest, parametrizations, writes to buffers, to
# weights, to the stream and to labels
QUICK = [
    *("FrozenBySetGradEnabled", "GradAgainInsideNoGrad", "InferenceFront", "NoAutocastInside"),
    *("orthogonal_projection", "HeadFromHiddenStates", "RandomHead", "BufferBetweenBlocks"),
    *("WeightScaledInPlaceUnderNoGrad", "StreamScaledInPlaceUnderNoGrad", "LabelsWrittenLate", "LabelsWrittenEarly"),
]


@pytest.mark.parametrize("name", slow_but(QUICK, VARIANTS))
def test_as_plain_pytorch(name: str) -> None:
    if name.startswith("InferenceFront") and torch.__version__ < "2.13":
        pytest.skip("AOTAutograd itself fails on inference mode inside of a graph, and leaves it on")
    model, heard = compare(VARIANTS[name], 3e-2 if "Autocast" in name else 1e-5)
    report = cggr_compile.runtime(model).reports[0]
    assert metrics(model)["matched"] == (name not in DENSE), metrics(model)
    if name in DENSE:
        assert DENSE[name] in report.reason and any(report.reason in text for text in heard)
        return
    record = report.record("insert_router")
    assert record.matched == (name not in UNROUTED), record.reason
    assert UNROUTED.get(name, "") in record.reason


PLACES = ("block 0", "block 1", "block 2", "scale", "shift", "norm", "head")


class Anywhere(Model):
    """Modes, writes and computed weights at places that ``seed`` picks."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.grad = {place: rng.random() < 0.6 for place in ("block 0", "scale", "shift", "norm", "labels")}
        self.cast = {place: rng.random() < 0.4 for place in (*PLACES, "labels")}
        self.write_after = rng.choice((None, 0, 1, 2))
        self.reads_level, self.own_norm = rng.random() < 0.5, rng.random() < 0.5

    def grads(self, place: str) -> Any:
        return torch.set_grad_enabled(self.grad.get(place, True))

    def casts(self, place: str) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.cast[place])

    def written(self, place: int) -> None:
        if self.write_after == place:
            with torch.no_grad():
                self.level.view(-1)[:1].mul_(1.5)

    def stack(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            with self.grads(f"block {i}"), self.casts(f"block {i}"):
                x = block(x)
            x = x.float()
            self.written(i)
        return x

    def logits(self, x: Tensor) -> Tensor:
        with self.grads("scale"), self.casts("scale"):
            weight = self.head.weight * (1 + self.table.weight.norm())
        with self.grads("shift"), self.casts("shift"):
            weight = weight.float() + (self.table.weight @ self.blocks[1].q.weight).float()
        if self.reads_level:
            weight = weight * self.level[0].clone()
        if self.own_norm:
            with self.grads("norm"), self.casts("norm"):
                scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            x = x * scale * (1 + self.norm.weight)
        else:
            x = self.norm(x)
        with self.grads("head"), self.casts("head"):
            return F.linear(x, weight)

    def targets(self, labels: Tensor) -> Tensor:
        with self.grads("labels"), self.casts("labels"):
            return torch.where(labels == 5, -100, labels)


@pytest.mark.parametrize("seed", slow_but([0, 4], range(SEEDS)))
def test_modes_and_writes_anywhere(seed: int) -> None:
    model, _ = compare(lambda: Anywhere(seed), 2e-2)
    assert metrics(model)["matched"], metrics(model)
    routed = cggr_compile.runtime(model).reports[0].record("insert_router").matched
    assert routed or (model.reads_level and model.write_after is not None)


def move_whatever(monkeypatch: Any) -> None:
    """Nodes move along data edges alone, and the anchor is where the router's block ends."""
    monkeypatch.setattr("cggr_compile.passes.analysis.hoist.Hoist.obstacle", lambda *args: "")
    monkeypatch.setattr("cggr_compile.passes.analysis.hoist.Hoist._same_there", lambda *args: True)
    monkeypatch.setattr("cggr_compile.passes.semantic.align_targets._anchor", lambda gm, ctx, after: after.next)


MOVED = {"HeadTimesDetachedFactor": "head.weight", "FrozenFirstBlockAndScaledHead": "head.weight"} | {
    "BufferThroughAView": ""
}
MOVED_QUICK = [
    ("HeadTimesDetachedFactor", "routed"),
    ("FrozenFirstBlockAndScaledHead", "exact"),
    ("BufferThroughAView", "routed"),
]


@pytest.mark.parametrize(
    "moved", slow_but(MOVED_QUICK, itertools.product(MOVED, ["exact", "routed"])), ids=lambda pair: "-".join(pair)
)
def test_verify_sees_what_has_moved(moved: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rule taken away, gradient and loss are wrong; ``verify`` raises, as it does not with the rule."""
    name, gradient = moved
    ids = torch.randint(0, VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(1))
    options = {"compiler": "eager", "verify": True, **ALL_LABELS, "gradient": gradient}

    def step() -> nn.Module:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = VARIANTS[name]()
        model.compile(backend="cggr", options=options)
        model(ids, ids).backward()
        return model

    verification = cggr_compile.runtime(step()).reports[0].verification
    assert verification.steps == 1 and verification.captured_error < 1e-5 and not verification.note
    move_whatever(monkeypatch)
    with pytest.raises(cggr_compile.VerificationError, match=f"and the captured one differ in .*{MOVED[name]}"):
        step()


@pytest.mark.parametrize(
    ("selection", "becomes", "remedy"),
    [
        ("importance", "'importance' draws every candidate with the same probability", "scoring='random'"),
        ("topk", "'topk' has nothing to rank by and becomes 'random'", "scoring='random'"),
        pytest.param(
            *("stratified", "'stratified' has nothing to rank by and becomes 'random'", "scoring='random'"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("sequence_aware", "'sequence_aware' has nothing to rank by and becomes 'random'", "scoring='random'"),
            marks=pytest.mark.slow,
        ),
        ("labels", "", ""),
    ],
)
def test_without_a_router_the_selection_is_told_and_weighted(selection: str, becomes: str, remedy: str) -> None:
    torch.manual_seed(0)
    model = VARIANTS["spectral_norm_head"]()
    model.compile(backend="cggr", options={"compiler": "eager", "selection": selection, "verify": True})
    ids = torch.randint(0, VOCAB, (4, SEQ), generator=torch.Generator().manual_seed(1))
    with complaints() as heard:
        for _ in range(2):
            model(ids, ids).backward()
    left_out = [text for text in heard if "the router is left out" in text]
    assert len(left_out) == bool(becomes)
    for text in left_out:
        assert becomes in text and remedy in text and "'normalize' (normalize)" in text and "writes in place" in text
    assert not any("biased" in text for text in heard)
    values, runtime = metrics(model), cggr_compile.runtime(model)
    assert values["matched"] and values["verify_steps"] == 2 and values["avg_difficulty"] is None
    kept = runtime.selected >= 0
    assert kept.any() and runtime.reports[0].verification.captured_error < 1e-5
    # every weight is 1 over the share that is drawn
    share = float(kept.sum()) / (4 * (SEQ - 1))
    assert float((runtime.weights[kept] * share - 1).abs().max()) < 0.2


@pytest.mark.slow
def test_a_ratio_that_follows_the_router_stands_still_without_one() -> None:
    torch.manual_seed(0)
    model = VARIANTS["spectral_norm_head"]()
    options = {"dynamic_threshold": True, "warmup_steps": 2, "selection": "random"}
    model.compile(backend="cggr", options={"compiler": "eager", **options})
    ids = torch.randint(0, VOCAB, (4, SEQ), generator=torch.Generator().manual_seed(1))
    ratios = []
    with complaints() as heard:
        for _ in range(4):
            model(ids, ids).backward()
            ratios.append(metrics(model)["ratio"])
    assert ratios[0] == 1.0 and ratios[2:] == [0.25, 0.25]
    assert any("dynamic_threshold does nothing" in text for text in heard)
    observed = next(r for r in cggr_compile.runtime(model).reports if r.ratio == 1.0).record("observe_router")
    assert not observed.matched and "no router" in observed.reason
