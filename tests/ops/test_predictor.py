"""The predictor of gradients: its training against autograd and ``torch.optim.Adam``, and what it says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import cggr_compile.ops  # noqa: F401  (registers)
from cggr_compile.ops import predictor as subject
from cggr_compile.ops.gradient_norms import gradient_norms_of

ops = torch.ops.cggr
HIDDEN, HEAD, VOCAB = 12, 8, 20
FEATURES = HIDDEN + HEAD


def scaled(rows: Tensor) -> Tensor:
    return rows / rows.square().mean(-1, keepdim=True).sqrt()


class Twin(torch.nn.Module):
    """The same network in plain PyTorch."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        width, begin = subject.WIDTH, subject.SUMS + 1
        self.first = torch.nn.Parameter(state[begin:][: FEATURES * width].view(FEATURES, width).clone())
        self.bias, self.second = torch.nn.Parameter(torch.zeros(width)), torch.nn.Parameter(torch.zeros(width - 1))

    def forward(self, hidden: Tensor, rows: Tensor) -> Tensor:
        units = torch.cat([scaled(hidden), scaled(rows)], -1) @ self.first + self.bias
        return units[..., 0] + torch.tanh(units[..., 1:]) @ self.second

    def flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters()])


def steps(count: int, seed: int = 0, batch: int = 2, rows: int = 40) -> list[tuple[Tensor, ...]]:
    """hidden, labels, norms and weights; the norm is a function of both that no linear one is."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        hidden = torch.randn(batch, rows, HIDDEN, generator=generator) * 3
        labels = torch.randint(0, VOCAB, (batch, rows), generator=generator)
        norms = (0.7 + 0.2 * scaled(hidden)[..., 0] + 0.1 * scaled(hidden)[..., 1].abs() + 0.01 * labels).clamp(0, 1.4)
        weights = torch.randint(0, 4, (batch, rows), generator=generator).float()  # 0: an unused slot
        found.append((hidden, labels, norms, weights))
    return found


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(VOCAB, HEAD, generator=torch.Generator().manual_seed(7))


def test_it_learns_as_adam_does(weight):
    state = subject.new_predictor(FEATURES)
    twin = Twin(state)
    first, *rest = twin.parameters()
    groups = [{"params": [first], "lr": 1 / FEATURES}, {"params": rest, "lr": subject.LEARNING_RATE}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    count = twin.flat().numel()
    for number, (hidden, labels, norms, weights) in enumerate(steps(5), 1):
        before, kept = state, state.clone()
        state = ops.fit(state, hidden, weight, labels, norms, weights)
        assert torch.equal(before, kept)  # what is run again is the same again
        optimizer.zero_grad()
        share = weights / weights.sum()
        (share * (twin(hidden, weight[labels]) - norms).square()).sum().backward()
        optimizer.step()
        ours = state[subject.SUMS + 1 :][:count]
        torch.testing.assert_close(ours, twin.flat(), atol=1e-6, rtol=1e-4)
        assert state[subject.SUMS] == number
    assert (ours - subject.new_predictor(FEATURES)[subject.SUMS + 1 :][:count]).abs().max() > 1e-3


def test_it_predicts_on_the_scale_of_what_was_found(weight):
    state = subject.new_predictor(FEATURES)
    hidden, labels, *_ = steps(1, seed=9)[0]
    assert torch.equal(ops.predict(state, hidden, weight, labels), torch.ones(labels.shape))  # nothing is known yet
    found, true, share = [], [], []
    for hidden, labels, norms, weights in steps(3):
        with torch.no_grad():
            own, label = subject._inputs(hidden, weight, labels)
            found.append(subject._output(state, own, label)[0])
        true.append(norms)
        share.append(weights / weights.sum())
        state = ops.fit(state, hidden, weight, labels, norms, weights)
    decay = 0.95 ** torch.tensor([2.0, 1.0, 0.0])
    w = torch.cat([(d * s).flatten() for d, s in zip(decay, share, strict=True)])
    f, g = torch.cat([t.flatten() for t in found]), torch.cat([t.flatten() for t in true])
    together = torch.cov(torch.stack([f, g]), correction=0, aweights=w)
    mean_f, mean_g = (w * f).sum() / w.sum(), (w * g).sum() / w.sum()
    hidden, labels, *_ = steps(1, seed=9)[0]
    raw = subject._output(state, *subject._inputs(hidden, weight, labels))[0]
    expected = mean_g + (together[0, 1] / together[0, 0]).clamp(min=0) * (raw - mean_f)
    got = ops.predict(state, hidden, weight, labels)
    torch.testing.assert_close(got, expected.clamp(0.0, math.sqrt(2.0)), atol=1e-4, rtol=1e-3)
    wanted = float(together[0, 1] / (together[0, 0] * together[1, 1]).sqrt())
    assert subject.correlation(state[: subject.SUMS]) == pytest.approx(wanted, abs=1e-3)


def test_it_comes_to_know(weight):
    state = subject.new_predictor(FEATURES)
    for step in steps(200, rows=100):
        hidden, labels, norms, weights = step
        state = ops.fit(state, hidden, weight, labels, norms, weights)
    hidden, labels, norms, _ = steps(1, seed=9, rows=400)[0]
    got = ops.predict(state, hidden, weight, labels)
    assert torch.corrcoef(torch.stack([got.flatten(), norms.flatten()]))[0, 1] > 0.9
    assert subject.correlation(state[: subject.SUMS]) > 0.9
    none = ops.predict(state, hidden, weight, torch.full_like(labels, -100))
    assert none.isfinite().all()


@pytest.mark.parametrize("broken", ["norms", "hidden"])
def test_what_is_not_finite_counts_nothing(weight, broken):
    hidden, labels, norms, weights = steps(1)[0]
    weights[0, :3] = 1.0
    rest = weights.clone()
    rest[0, 1] = 0.0
    if broken == "norms":
        norms[0, 1] = torch.nan
    else:
        hidden[0, 1, 4], rest = torch.inf, weights  # it counts, with zeros for the hidden state
    state = subject.new_predictor(FEATURES)
    got = ops.fit(state, hidden, weight, labels, norms, weights)
    hidden[0, 1] = torch.where(hidden[0, 1].isfinite().all(), hidden[0, 1], 0.0)
    norms[0, 1] = norms[0, 1].nan_to_num()
    torch.testing.assert_close(got, ops.fit(state, hidden, weight, labels, norms, rest))
    assert got.isfinite().all() and not torch.equal(got, state)
    assert torch.equal(ops.fit(got, hidden, weight, labels, norms, torch.zeros_like(weights)), got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_learn_the_same(weight, dtype):
    exact = other = subject.new_predictor(FEATURES)
    for hidden, labels, norms, weights in steps(30):
        hidden, rows = hidden.to(dtype), weight.to(dtype)
        exact = ops.fit(exact, hidden.float(), rows.float(), labels, norms, weights)
        other = ops.fit(other, hidden, rows, labels, norms.to(dtype), weights)
    assert other.dtype == torch.float32
    hidden, labels, *_ = steps(1, seed=9)[0]
    wanted, got = (ops.predict(state, hidden, weight, labels) for state in (exact, other))
    torch.testing.assert_close(got, wanted, atol=0.02 if dtype != torch.float64 else 1e-4, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.predict(exact, hidden, weight, labels), wanted)


def test_opcheck(weight):
    hidden, labels, norms, weights = steps(1)[0]
    state = subject.new_predictor(FEATURES)
    tests = ("test_schema", "test_faketensor")  # they are made of ATen, and have no gradient
    for op, arguments in (
        (ops.predict.default, (state, hidden, weight, labels)),
        (ops.fit.default, (state, hidden, weight, labels, norms, weights)),
        (ops.gradient_norms.default, (torch.randn(2, 3, 5), torch.tensor([[0, 4, -100], [1, 2, 3]]))),
    ):
        assert set(opcheck(op, arguments, test_utils=tests).values()) == {"SUCCESS"}, op


def test_gradient_norms():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 5, 3, -100])
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (grad,) = torch.autograd.grad(each, logits)
    torch.testing.assert_close(ops.gradient_norms(logits, labels), grad.norm(dim=1))
    log_p = logits.detach().log_softmax(-1)
    picked = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    values = picked[:3], torch.logsumexp(2 * log_p, 1)[:3]
    torch.testing.assert_close(gradient_norms_of(*values), grad.norm(dim=1)[:3])
    torch.testing.assert_close(
        ops.gradient_norms((logits.detach() * 1000).half(), labels)[:3], (logits.argmax(1) != labels)[:3] * 2.0**0.5
    )
