from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured

from cggr_compile.causes import Cause
from cggr_compile.passes.facts import LossSite, NoSingleLoss

V = models.VOCAB


def reason(function, *args):
    captured = Captured(function, *args)
    result = captured.run("find_loss")
    return captured, result


def refusal(function, *args):
    """Why it is no single cross-entropy."""
    captured, result = reason(function, *args)
    assert not result.matched and result.cause is None  # find_token_values has its turn
    return captured.ctx[NoSingleLoss].refusal


@pytest.fixture
def tensors():
    return torch.randn(2, 8, 4), torch.randn(V, 4, requires_grad=True), torch.randint(0, V, (2, 8))


SPELLINGS = {
    "flattened": lambda h, w, y: F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1)),
    "shifted": lambda h, w, y: F.cross_entropy(F.linear(h, w)[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)),
    "ellipsis": lambda h, w, y: F.cross_entropy(
        F.linear(h, w)[..., :-1, :].contiguous().view(-1, V), y[..., 1:].reshape(-1)
    ),
    "transposed": lambda h, w, y: F.cross_entropy(F.linear(h, w).transpose(1, 2), y),
    "permuted": lambda h, w, y: F.cross_entropy(F.linear(h, w).permute(0, 2, 1), y),
    "module": lambda h, w, y: torch.nn.CrossEntropyLoss(ignore_index=0)(F.linear(h, w).flatten(0, 1), y.flatten()),
    "matmul": lambda h, w, y: F.cross_entropy((h @ w.t()).view(-1, V), y.view(-1)),
    "flat hidden": lambda h, w, y: F.cross_entropy(F.linear(h.view(-1, 4), w), y.view(-1)),
    "aten": lambda h, w, y: torch.ops.aten.cross_entropy_loss(F.linear(h, w).view(-1, V), y.view(-1)),
    "cast": lambda h, w, y: F.cross_entropy(F.linear(h, w).to(torch.float64).view(-1, V), y.view(-1)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling, tensors):
    captured, result = reason(SPELLINGS[spelling], *tensors)
    assert result.matched, result.reason
    site = captured.ctx[LossSite]
    assert site is not None
    assert site.vocab == V and site.reduction == "mean"
    assert site.transposed == (spelling == "matmul")
    assert site.ignore_index == (0 if spelling == "module" else -100)
    assert (site.scale, site.softcap, site.start) == (1.0, 0.0, 0)


def test_reads_offset_of_a_slice(tensors):
    function = lambda h, w, y: F.cross_entropy(F.linear(h, w)[:, 2:].reshape(-1, V), y[:, 2:].reshape(-1))  # noqa: E731
    captured, _ = reason(function, *tensors)
    assert captured.ctx[LossSite].start == 2


@pytest.mark.parametrize(
    ("post", "scale", "softcap"),
    [
        (lambda z: z * 0.5, 0.5, 0.0),
        (lambda z: z / 4, 0.25, 0.0),
        (lambda z: torch.tanh(z / 30.0) * 30.0, 1.0, 30.0),
        (lambda z: 30.0 * torch.tanh((z * 0.5) / 30.0), 0.5, 30.0),
        (lambda z: 2.0 * (torch.tanh(z / 30.0) * 15.0), 1.0, 30.0),
    ],
)
def test_scale_and_softcap(post, scale, softcap, tensors):
    captured, result = reason(lambda h, w, y: F.cross_entropy(post(F.linear(h, w)).view(-1, V), y.view(-1)), *tensors)
    assert result.matched
    z = torch.randn(100) * 20
    site = captured.ctx[LossSite]
    ours = site.softcap * torch.tanh(site.scale * z / site.softcap) if site.softcap else site.scale * z
    torch.testing.assert_close(ours, post(z))


def test_sum_and_label_smoothing(tensors):
    function = lambda h, w, y: F.cross_entropy(  # noqa: E731
        F.linear(h, w).view(-1, V), y.view(-1), reduction="sum", label_smoothing=0.1
    )
    site = reason(function, *tensors)[0].ctx[LossSite]
    assert (site.reduction, site.label_smoothing) == ("sum", 0.1)


NOT_MATCHED = {
    "no cross-entropy": lambda h, w, y: F.linear(h, w).sum(),
    "2 cross-entropies": lambda h, w, y: sum(F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1)) for _ in "ab"),
    "class weights": lambda h, w, y: F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1), weight=torch.ones(V)),
    "reduction='none'": lambda h, w, y: F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1), reduction="none").sum(),
    "class probabilities": lambda h, w, y: F.cross_entropy(
        F.linear(h, w).view(-1, V), F.one_hot(y.view(-1), V).float()
    ),
    "'sigmoid' between": lambda h, w, y: F.cross_entropy(F.linear(h, w).sigmoid().view(-1, V), y.view(-1)),
    "also feed": lambda h, w, y: (
        (z := F.linear(h, w)).logsumexp(-1).square().mean() * 1e-4 + F.cross_entropy(z.view(-1, V), y.view(-1))
    ),
    "size_average": lambda h, w, y: F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1), size_average=True),
}


@pytest.mark.parametrize("why", NOT_MATCHED)
def test_must_not_match(why, tensors):
    result = refusal(NOT_MATCHED[why], *tensors)
    assert result.cause is (Cause.NO_LOSS if why == "no cross-entropy" else Cause.UNSUPPORTED_LOSS)
    assert why in result.reason


def test_an_operator_of_the_same_name(tensors):
    """Whoever named it may have arguments in another order, or another reduction."""

    @torch.library.custom_op("find_loss_test::cross_entropy", mutates_args=())
    def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, target, reduction="sum")

    cross_entropy.register_fake(lambda logits, target: logits.new_empty(()))
    operator = torch.ops.find_loss_test.cross_entropy
    result = refusal(lambda h, w, y: operator(F.linear(h, w).view(-1, V), y.view(-1)), *tensors)
    assert result.cause is Cause.NO_LOSS


def test_logits_from_outside():
    result = Captured(
        lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1)), torch.randn(2, 3, V), torch.ones(2, 3).long()
    )
    assert result.run("find_token_values").cause is Cause.NO_HEAD


def test_metrics_of_the_logits_do_not_matter(tensors):
    def with_accuracy(h, w, y):
        logits = F.linear(h, w)
        return F.cross_entropy(logits.view(-1, V), y.view(-1)), (logits.argmax(-1) == y).float().mean()

    assert reason(with_accuracy, *tensors)[1].matched
