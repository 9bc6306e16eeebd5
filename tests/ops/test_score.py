"""``score`` against softmax in float64. Its helpers serve tests/kernels and tests/gpu too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import cggr_compile.ops.score as implementation
from cggr_compile.ops.score import score, score_partials, to_fp8

NAMES = ("logsumexp", "entropy", "top1", "top2", "label_logprob")


def make_case(rows, vocab, width, *, bias=False, scale=1.0, softcap=0.0, dtype=torch.float32, device="cpu", sharp=1.0):
    """Arguments of the op; a fifth of the labels is -100, and one lies past the vocabulary."""
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = (torch.randn(vocab, width, device=device) * sharp / width**0.5).to(dtype)
    labels = torch.randint(0, vocab, (rows,), device=device)
    labels[::5] = -100
    labels[-1:] = vocab + 7
    return hidden, weight, torch.randn(vocab, device=device).to(dtype) if bias else None, labels, scale, softcap


def expected(hidden, weight, bias, labels, scale, softcap):
    """Written without any of the code under test."""
    z = (hidden.double() @ weight.double().T + (0.0 if bias is None else bias.double())) * scale
    z = torch.tanh(z / softcap) * softcap if softcap else z
    logp = z.log_softmax(-1)
    ordered = logp.sort(-1, descending=True).values
    top2 = ordered[..., 1].exp() if ordered.shape[-1] > 1 else torch.zeros_like(ordered[..., 0])
    known = (labels >= 0) & (labels < weight.shape[0])
    picked = logp.gather(-1, torch.where(known, labels, 0)[..., None])[..., 0]
    return (
        z.logsumexp(-1),
        torch.distributions.Categorical(logits=z).entropy(),
        ordered[..., 0].exp(),
        top2,
        torch.where(known, picked, 0.0),
    )


def check(got, wanted, tolerance):
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape, name
        assert a.isfinite().all(), name
        torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.one_of(st.integers(1, 40), st.integers(120, 400)),  # above 128 top-2 goes by groups
    st.sampled_from([0.0, 2.0]),
    st.sampled_from([1.0, 0.3]),
    st.booleans(),
)
def test_equals_softmax(rows, vocab, softcap, scale, bias):
    case = make_case(rows, vocab, 6, bias=bias, scale=scale, softcap=softcap, sharp=3.0)
    check(score(*case), expected(*case), 1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 300), st.integers(1, 300), st.integers(0, 1))
def test_spans_and_chunks_do_not_matter(rows, vocab, span, tied):
    case = make_case(rows, vocab, 5, sharp=3.0)
    if tied:
        case[1][vocab // 2 :] = case[1][: vocab - vocab // 2].clone()  # equal logits in different spans
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(implementation, "SPAN", span)
        patch.setattr(implementation, "CHUNK_LOGITS", 3 * span)
        patch.setattr(implementation, "CACHED_LOGITS", 2 * span)
        patch.setattr(torch.Tensor, "is_cuda", True)
        got = implementation.score_reference(*case)
    check(got, expected(*case), 1e-4)


def make_fp8_case(rows, vocab, width, **modes):
    """``make_case`` with rows and columns of very different sizes, and arguments of ``score_partials`` but the span."""
    hidden, weight, bias, _, *rest = make_case(rows, vocab, width, **modes)
    hidden = hidden * torch.logspace(-4, 1, rows, dtype=hidden.dtype, device=hidden.device)[:, None]
    weight = weight * torch.linspace(0.1, 2, vocab, dtype=weight.dtype, device=weight.device)[:, None]
    (left, row_scale), (right, column_scale) = to_fp8(hidden), to_fp8(weight)
    return left, right, bias, *rest, row_scale, column_scale


def ranks(values):
    return values.flatten().argsort().argsort().double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_keeps_size_and_zeros(dtype):
    matrix = torch.randn(50, 64, dtype=dtype) * torch.logspace(-20, 20, 50)[:, None].to(dtype)
    matrix[3] = 0.0
    found, factor = to_fp8(matrix)
    assert found.dtype == torch.float8_e4m3fn and factor.dtype == torch.float32
    error = (found.float() * factor[:, None] - matrix.float()).abs()
    # 3 bits of mantissa, and below 2**-6 of 448 steps of 2**-9
    assert (error <= torch.maximum(matrix.float().abs() / 16, factor[:, None] * 2.0**-9)).all()


@pytest.mark.parametrize("modes", [dict(), dict(bias=True, softcap=5.0, scale=0.7)])
def test_fp8_keeps_the_ranking(modes):
    case = make_case(400, 500, 64, **modes)
    case = (case[0] * torch.linspace(0.2, 4.0, 400)[:, None], *case[1:])
    got, wanted = score(*case, True), score(*case)
    assert not torch.equal(got[1], wanted[1])
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        assert torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1] > 0.97, name


def test_scales_multiply():
    case = make_fp8_case(9, 50, 16, bias=True, softcap=3.0)
    plain = (case[0].double() * case[-2][:, None], case[1].double() * case[-1][:, None], case[2].double(), *case[3:5])
    torch.testing.assert_close(score_partials(*case[:5], 16, *case[5:]), score_partials(*plain, 16))


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("vocab", [3, 200])
def test_ties(vocab, copies):
    hidden, weight = torch.ones(1, 1, 1), torch.zeros(vocab, 1)
    weight[-copies:] = 1.0
    _, _, top1, top2, _ = score(hidden, weight, None, torch.tensor([[0]]), 1.0, 0.0)
    assert top1.item() == top2.item()


def test_large_logits():
    case = make_case(6, 200, 8, sharp=300.0)
    check(score(*case), expected(*case), 1e-3)


def test_leading_axes():
    hidden, weight, bias, labels, *rest = make_case(12, 30, 8, bias=True)
    flat = score(hidden, weight, bias, labels, *rest)
    shaped = score(hidden.view(3, 4, 8), weight, bias, labels.view(3, 4), *rest)
    for a, b in zip(flat, shaped, strict=True):
        assert torch.equal(a.view(3, 4), b)


def test_no_rows():
    case = make_case(5, 30, 8)
    assert all(value.shape == (0,) for value in score(case[0][:0], *case[1:3], case[3][:0], *case[4:]))


def test_operator():
    case = make_case(4, 30, 8, bias=True, softcap=3.0)
    opcheck(score_partials, (*case[:3], *case[4:], 16))
    opcheck(score, case)
    fits = ("test_faketensor", "test_aot_dispatch_static")  # the others compute with 8-bit floats, which torch cannot
    opcheck(score, (*case, True), test_utils=fits)
    eighth = make_fp8_case(4, 30, 8)
    opcheck(score_partials, (*eighth[:5], 16, *eighth[5:]), test_utils=fits)


def test_the_comparison_can_fail():
    case = make_case(20, 50, 8)
    with pytest.raises(AssertionError):
        check(score(*case), expected(case[0], case[1], None, case[3].roll(1), *case[4:]), 1e-4)
