"""``linear_cross_entropy`` against ``F.cross_entropy`` of the logits. Its helpers serve other tests too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import cggr_compile.ops.head_gradients as backward
import cggr_compile.ops.token_log_probs as forward
from cggr_compile.ops.head_gradients import logits_of
from cggr_compile.ops.linear_cross_entropy import linear_cross_entropy

NAMES = ("loss", "logsumexp", "d_hidden", "d_weight", "d_bias")
MODES = [dict(), dict(bias=True, softcap=2.0, scale=0.3, smoothing=0.1), dict(scale=0.5, smoothing=0.2)]


def make_case(
    rows, vocab, width, *, bias=False, scale=1.0, softcap=0.0, smoothing=0.0, dtype=torch.float32, device="cpu"
):
    """Arguments of the op; a fifth of the labels is -100, and one lies past the vocabulary."""
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = (3.0 * torch.randn(vocab, width, device=device) / width**0.5).to(dtype)
    labels = torch.randint(0, vocab, (rows,), device=device)
    labels[::5] = -100
    labels[-1:] = vocab + 7
    bias = torch.randn(vocab, device=device).to(dtype) if bias else None
    return hidden, weight, bias, labels, scale, softcap, smoothing


def test_norms_of_the_gradients():
    """Of the loss without smoothing; they have no gradient, and are 0 where there is no label."""
    case = make_case(11, 30, 8, bias=True, softcap=2.0, smoothing=0.1)
    hidden, weight, bias, labels, scale, softcap, _ = case
    norms = linear_cross_entropy(*[t.requires_grad_() for t in case[:3]], *case[3:], True)[2]
    z = logits_of(hidden, weight, bias, scale, softcap).detach()
    torch.testing.assert_close(norms, torch.ops.cggr.gradient_norms(z, labels))
    assert not norms.requires_grad and (norms[::5] == 0).all() and (norms > 0).any()
    assert linear_cross_entropy(*case)[2].numel() == 0


def make_grads(case, with_logsumexp=True):
    like = case[0].new_empty(case[0].shape[0], dtype=torch.float64 if case[0].dtype == torch.float64 else torch.float32)
    return torch.randn_like(like), torch.randn_like(like) if with_logsumexp else None


def run(case, grads):
    """Loss, logsumexp and the gradients that they have under ``grads``."""
    hidden, weight, bias = (None if t is None else t.detach().requires_grad_() for t in case[:3])
    loss, logsumexp, _ = linear_cross_entropy(hidden, weight, bias, *case[3:])
    outputs = [(o, g) for o, g in zip((loss, logsumexp), grads, strict=True) if g is not None]
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    found = torch.autograd.grad([o for o, _ in outputs], inputs, [g for _, g in outputs])
    return (loss.detach(), logsumexp.detach(), *found)


def expected(case, grads):
    """Written with the logits, in float64, and without any of the code under test."""
    hidden, weight, bias = (None if t is None else t.detach().double().requires_grad_() for t in case[:3])
    labels, scale, softcap, smoothing = case[3:]
    z = F.linear(hidden, weight, bias) * scale
    z = torch.tanh(z / softcap) * softcap if softcap else z
    labels = torch.where(labels < weight.shape[0], labels, -100)
    loss = F.cross_entropy(z, labels, reduction="none", label_smoothing=smoothing)
    logsumexp = z.logsumexp(-1)
    total = (loss * grads[0].double()).sum()
    if grads[1] is not None:
        total = total + (logsumexp * grads[1].double()).sum()
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    return (loss.detach(), logsumexp.detach(), *torch.autograd.grad(total, inputs))


def check(got, wanted, tolerance):
    """Errors relative to the largest entry: gradients of a float16 model are sums of rounded terms."""
    for name, a, b in zip(NAMES, got, wanted, strict=False):
        assert a.shape == b.shape, name
        assert a.isfinite().all(), name
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=0.1) if a.numel() else torch.zeros(())
        assert error < tolerance, f"{name}: {error.item():.1e}"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(1, 40), st.sampled_from(MODES), st.booleans(), st.integers(1, 50))
def test_equals_cross_entropy_of_the_logits(rows, vocab, modes, with_logsumexp, workspace):
    case = make_case(rows, vocab, 6, **modes)
    grads = make_grads(case, with_logsumexp)
    with pytest.MonkeyPatch.context() as patch:
        for module in (forward, backward):
            patch.setattr(module, "WORKSPACE", {"cpu": workspace})
        patch.setattr(backward, "COLUMNS", 3)
        got = run(case, grads)
    check(got, expected(case, grads), 1e-4)


@pytest.mark.parametrize("labels", [[-100] * 4, [0, 1, 2, 3]])
def test_no_labels_and_all_labels(labels):
    case = [*make_case(4, 12, 5, bias=True)]
    case[3] = torch.tensor(labels)
    grads = make_grads(case, False)
    got = run(case, grads)
    check(got, expected(case, grads), 1e-4)
    assert labels[0] == 0 or not any(gradient.any() for gradient in (got[0], *got[2:]))


@pytest.mark.parametrize("modes", MODES)
def test_gradcheck(modes, monkeypatch):
    monkeypatch.setattr(backward, "WORKSPACE", {"cpu": 10})
    monkeypatch.setattr(backward, "COLUMNS", 2)
    case = make_case(4, 7, 3, dtype=torch.float64, **modes)
    inputs = [t.requires_grad_() for t in case[:3] if t is not None]

    def function(hidden, weight, bias=None):
        return linear_cross_entropy(hidden, weight, bias, *case[3:])

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    case = make_case(20, 60, 16, dtype=dtype, bias=True)
    grads = make_grads(case)
    got = run(case, grads)
    assert [t.dtype for t in got] == [torch.float32] * 2 + [dtype] * 3
    check(got, expected(case, grads), 3e-2)


def test_z_loss():
    """PaLM's, with the weights that a caller gives the rows."""
    case = make_case(8, 30, 5)
    hidden, weight = (t.requires_grad_() for t in case[:2])
    known, counts = (case[3] >= 0) & (case[3] < 30), torch.rand(8)
    loss, logsumexp, _ = linear_cross_entropy(hidden, weight, *case[2:])
    got = torch.autograd.grad((counts * (loss + 0.1 * known * logsumexp**2)).sum(), (hidden, weight))
    z = hidden @ weight.T
    target = torch.where(known, case[3], -100)
    reference = F.cross_entropy(z, target, reduction="none") + 0.1 * known * z.logsumexp(-1) ** 2
    wanted = torch.autograd.grad((counts * reference).sum(), (hidden, weight))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_strides():
    hidden, weight, *rest = make_case(8, 30, 6)
    grads = make_grads((hidden,))
    wide, columns = torch.stack([hidden, hidden], -1)[..., 0], weight.t().contiguous().t()
    check(run((wide, columns, *rest), grads), expected((hidden, weight, *rest), grads), 1e-4)


BAD = {
    "hidden must be floats": (0, torch.randn(2, 3, 4)),
    "weight must be .vocabulary, 4.": (1, torch.randn(9, 3)),
    "weight must have the dtype of hidden": (1, torch.randn(9, 4).half()),
    "bias must be .9.": (2, torch.randn(4)),
    "labels must be integers .5.": (3, torch.zeros(5)),
    "softcap must be >= 0": (5, -1.0),
    r"label_smoothing must be in \[0, 1\]": (6, 1.5),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    case = [*make_case(5, 9, 4)]
    position, value = BAD[message]
    case[position] = value
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*case)


def test_operator():
    case = make_case(5, 9, 4, bias=True, softcap=3.0, smoothing=0.1)
    opcheck(linear_cross_entropy, ([t.requires_grad_() for t in case[:3]] + [*case[3:]]))


def test_in_generated_code():
    case = make_case(8, 30, 5, bias=True, softcap=2.0)
    hidden, weight, bias = (t.requires_grad_() for t in case[:3])

    def step(hidden, weight, bias):
        loss, logsumexp, _ = linear_cross_entropy(hidden.sin(), weight, bias, *case[3:])
        return (loss * logsumexp.cos()).sum()

    wanted = torch.autograd.grad(step(hidden, weight, bias), (hidden, weight, bias))
    compiled = torch.compile(step, fullgraph=True)(hidden, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(compiled, (hidden, weight, bias)), wanted)


def test_the_comparison_can_fail():
    case = make_case(20, 50, 8)
    grads = make_grads(case)
    wrong = (*case[:3], case[3].roll(1), *case[4:])
    with pytest.raises(AssertionError):
        check(run(wrong, grads), expected(case, grads), 1e-4)
    with pytest.raises(AssertionError):
        check(run(case, (grads[0], None)), expected(case, grads), 1e-4)
