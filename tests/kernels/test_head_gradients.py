"""The kernels of ``linear_cross_entropy`` without a GPU: interpreted for their numbers, compiled for fit."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from ops.test_linear_cross_entropy import check, expected, make_case, make_grads  # noqa: E402
from triton_harness import binaries_for, compiled, interpreted  # noqa: E402

import cggr_compile.ops.linear_cross_entropy as implementation  # noqa: E402
from cggr_compile.kernels import linear_cross_entropy as kernels  # noqa: E402
from cggr_compile.kernels.score import score_partials_triton  # noqa: E402

SMALL = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, GROUP=2, SPAN=32)
MODES = [dict(), dict(bias=True, softcap=2.0, scale=0.3, smoothing=0.1), dict(bias=True, scale=0.5, smoothing=0.2)]


def run(case, grads, span=32, columns=None, **overrides):
    """Loss, logsumexp and gradients, as on a GPU; ``columns``: of the workspace."""
    hidden, weight, bias, labels, scale, softcap, smoothing = case
    sizes = {**SMALL, **overrides}
    of_score = {name: sizes[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP")}
    partials = score_partials_triton(hidden, weight, bias, scale, softcap, span, **of_score)
    mean = implementation._mean_logits(hidden, weight, bias, scale, softcap) if smoothing else None
    loss, lse = kernels.loss_triton(partials, hidden, weight, bias, labels, mean, scale, softcap, smoothing)
    factors = implementation._factors(*grads, labels, weight.shape[0])

    def logit_gradient(part, into):
        into.fill_(torch.nan)  # poisoned
        kernels.logit_gradient_triton(
            hidden, weight, bias, labels, lse, *factors, scale, softcap, smoothing, part, into, **sizes
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(implementation, "COLUMNS", columns or implementation.COLUMNS)
        workspace = hidden.shape[0] * (columns or weight.shape[0])
        found = implementation._multiply_out(logit_gradient, hidden, weight, [True, True, bias is not None], workspace)
    return (loss, lse, *found)


@interpreted
@pytest.mark.parametrize(
    ("rows", "vocab", "width", "span", "descriptors"),
    [
        *((1, 1, 16, 16, False), (33, 64, 16, 32, False), (16, 50, 24, 32, False), (20, 70, 33, 64, False)),
        *((3, 17, 8, 16, True), (33, 50, 20, 32, True)),
    ],
)
@pytest.mark.parametrize("modes", [*MODES[:2], pytest.param(MODES[2], marks=pytest.mark.slow)])
def test_sizes(rows, vocab, width, span, descriptors, modes):
    case = make_case(rows, vocab, width, **modes)
    grads = make_grads(case, with_logsumexp=descriptors)
    check(run(case, grads, span, DESCRIPTORS=descriptors), expected(case, grads), 1e-4)


@interpreted
@pytest.mark.parametrize("columns", [1, 32, 37])
def test_spans_of_the_workspace(columns):
    case = make_case(20, 70, 16, bias=True)
    grads = make_grads(case)
    check(run(case, grads, columns=columns), expected(case, grads), 1e-4)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype):
    case = make_case(20, 70, 32, dtype=dtype, bias=True, softcap=3.0, smoothing=0.1)
    grads = make_grads(case)
    got = run(case, grads)
    wanted = expected(case, grads)
    check(got[:2], wanted[:2], 1e-3)
    check(got[2:], wanted[2:], 2e-2)


@interpreted
def test_strides():
    hidden, weight, bias, labels, *rest = make_case(20, 40, 16, bias=True)
    grads = make_grads((hidden,))
    wide = torch.stack([hidden, hidden], -1)[..., 0]
    twice = torch.stack([labels, labels], -1)[..., 1]
    check(run((wide, weight, bias, twice, *rest), grads), expected((hidden, weight, bias, labels, *rest), grads), 1e-4)


@interpreted
def test_large_logits():
    case = make_case(6, 100, 16)
    case = (case[0] * 100.0, *case[1:])
    grads = make_grads(case)
    check(run(case, grads), expected(case, grads), 1e-3)


@interpreted
@pytest.mark.parametrize("modes", MODES[::2])
def test_as_the_operator_calls_them(modes, monkeypatch):
    monkeypatch.setattr(implementation, "runs_kernels", lambda hidden: True)
    hidden, weight, *rest = make_case(20, 1100, 32, **modes)
    case = (hidden, weight.t().contiguous().t(), *rest)
    grads = make_grads(case)
    monkeypatch.setattr(implementation, "WORKSPACE", {"cuda": 1})  # two spans
    loss, lse = implementation._forward_cuda(*case)
    found = implementation._backward_cuda(*grads, *case[:4], lse, *case[4:], [True, True, case[2] is not None])
    check((loss, lse, *found), expected(case, grads), 1e-4)


@interpreted
def test_no_rows():
    case = make_case(0, 20, 16, bias=True)
    got = run(case, make_grads(case))
    assert [tuple(t.shape) for t in got] == [(0,), (0,), (0, 16), (20, 16), (20,)] and not got[3].any()


@interpreted
def test_the_comparison_can_fail():
    case = make_case(20, 64, 16)
    grads = make_grads(case)
    with pytest.raises(AssertionError):
        check(run((*case[:3], case[3].roll(1), *case[4:]), grads), expected(case, grads), 1e-4)
    with pytest.raises(AssertionError):
        check(run(case, grads)[2:], expected(case, (2 * grads[0], grads[1]))[2:], 1e-4)


@compiled
@pytest.mark.parametrize(
    ("arch", "vocab", "width", "modes"),
    [
        (80, 49152, 576, dict(dtype=torch.bfloat16)),
        (90, 49152, 576, dict(dtype=torch.bfloat16)),
        (100, 49152, 576, dict(dtype=torch.bfloat16)),
        (90, 50257, 100, dict(dtype=torch.float16, bias=True, softcap=30.0, smoothing=0.1)),
        (90, 49152, 576, dict(dtype=torch.float32)),
    ],
)
def test_compiles_without_a_gpu(monkeypatch, tmp_path, arch, vocab, width, modes):
    descriptors = arch >= 90 and modes["dtype"] == torch.bfloat16
    hidden, weight, bias, labels, scale, softcap, smoothing = make_case(256, vocab, width, **modes)
    rows = torch.randn(256)
    part = slice(8192, min(vocab, 16384))
    into = hidden.new_empty(256, 8192)

    def call():
        kernels.logit_gradient_triton(
            *(hidden, weight, bias, labels, rows, rows, rows, scale, softcap, smoothing, part, into),
            DESCRIPTORS=descriptors,
        )
        partials = torch.randn(4, 25, 256)
        mean = rows if smoothing else None
        kernels.loss_triton(partials, hidden, weight, bias, labels, mean, scale, softcap, smoothing)

    launched = [(kernels, "_logit_gradient_kernel"), (kernels, "_loss_kernel")]
    found = binaries_for(monkeypatch, tmp_path, arch, launched, call)
    for kernel in found:
        assert kernel.asm["cubin"].startswith(b"\x7fELF")
        assert f".target sm_{arch}" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= (166912 if arch == 80 else 232448)
    assert ("mma" in found[0].asm["ptx"]) == (modes["dtype"] != torch.float32)
