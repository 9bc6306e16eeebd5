"""The Triton kernel of ``score_partials`` without a GPU: interpreted for its numbers, compiled for fit."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from ops.test_score import check, expected, make_case, make_fp8_case  # noqa: E402
from triton_harness import binaries_for, compiled, interpreted  # noqa: E402

import cggr_compile.ops.score as implementation  # noqa: E402
from cggr_compile.kernels import score as kernels  # noqa: E402
from cggr_compile.ops.score import score_partials_reference  # noqa: E402

SMALL = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, GROUP=2)


def run(case, span, **overrides):
    """All of ``score`` with the kernel in place of the reference; outputs poisoned."""
    arguments = (*case[:3], *case[4:], span)
    partials = kernels.score_partials_triton(*arguments, **{**SMALL, **overrides})
    assert partials.shape == score_partials_reference(*arguments).shape
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(implementation, "score_partials", lambda *_: partials)
        return implementation.score_reference(*case)


@interpreted
@pytest.mark.parametrize(
    ("rows", "vocab", "width", "span"),
    [(1, 1, 16, 16), (33, 64, 16, 32), (16, 50, 24, 32), (40, 130, 33, 64), (50, 32, 64, 2048), (3, 17, 5, 16)],
)
@pytest.mark.parametrize(
    ("modes", "descriptors"),
    [
        (dict(), True),
        (dict(bias=True, softcap=2.0, scale=0.3), False),
        pytest.param(dict(), False, marks=pytest.mark.slow),
        pytest.param(dict(bias=True, softcap=2.0, scale=0.3), True, marks=pytest.mark.slow),
    ],
)
def test_sizes(rows, vocab, width, span, modes, descriptors):
    case = make_case(rows, vocab, width, sharp=3.0, **modes)
    check(run(case, span, DESCRIPTORS=descriptors and width % 4 == 0), expected(*case), 1e-4)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype):
    case = make_case(20, 70, 32, dtype=dtype, bias=True)
    check(run(case, 32), expected(*case), 1e-3)


@interpreted
@pytest.mark.parametrize("modes", [dict(), dict(bias=True, softcap=2.0, scale=0.3)])
@pytest.mark.parametrize("descriptors", [False, True])
def test_8_bits(modes, descriptors):
    *arguments, row_scale, column_scale = make_fp8_case(20, 70, 32, **modes)
    scales = (row_scale, column_scale)
    found = kernels.score_partials_triton(*arguments, 32, *scales, **SMALL, DESCRIPTORS=descriptors)
    torch.testing.assert_close(found, score_partials_reference(*arguments, 32, *scales), atol=1e-4, rtol=1e-4)


@interpreted
def test_ties_within_and_across_spans():
    case = make_case(20, 64, 16)
    for source, target in ((0, 5), (1, 33)):
        weight = case[1].clone() * 0.1
        weight[source] = weight[target] = 5.0
        hidden = case[0].abs()
        _, _, top1, top2, _ = run((hidden, weight, *case[2:]), 32)
        assert torch.equal(top1, top2)


@interpreted
def test_strides():
    hidden, weight, bias, labels, *rest = make_case(20, 40, 16, bias=True)
    wide = torch.stack([hidden, hidden], -1)[..., 0]
    columns = weight.t().contiguous().t()
    spread = torch.stack([bias, bias + 9], -1)[..., 0]
    check(run((wide, columns, spread, torch.stack([labels, labels], -1)[..., 1], *rest), 32),
          expected(hidden, weight, bias, labels, *rest), 1e-4)  # fmt: skip


@interpreted
def test_large_logits():
    case = make_case(6, 100, 16, sharp=300.0)
    check(run(case, 32), expected(*case), 1e-3)


@interpreted
def test_the_comparison_can_fail():
    case = make_case(20, 64, 16)
    with pytest.raises(AssertionError):
        check(run((*case[:3], case[3].roll(1), *case[4:]), 32), expected(*case), 1e-4)


@compiled
@pytest.mark.parametrize(("arch", "shared_memory"), [(80, 166912), (90, 232448), (100, 232448)])
@pytest.mark.parametrize(
    ("vocab", "width", "descriptors", "modes"),
    [
        (49152, 576, True, dict(dtype=torch.bfloat16)),
        (100, 64, True, dict(dtype=torch.bfloat16)),  # a single span
        (50257, 100, False, dict(dtype=torch.float16, bias=True, softcap=30.0)),
        (49152, 576, False, dict(dtype=torch.float32)),
    ],
)
def test_compiles_without_a_gpu(monkeypatch, tmp_path, arch, shared_memory, vocab, width, descriptors, modes):
    descriptors = descriptors and arch >= 90
    case = make_case(256, vocab, width, **modes)

    def call():
        kernels.score_partials_triton(*case[:3], *case[4:], 2048, DESCRIPTORS=descriptors)

    (kernel,) = binaries_for(monkeypatch, tmp_path, arch, [(kernels, "_score_kernel")], call)
    assert kernel.asm["cubin"].startswith(b"\x7fELF")
    assert f".target sm_{arch}" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= shared_memory
    assert ("mma" in kernel.asm["ptx"]) == (modes["dtype"] != torch.float32)


@compiled
@pytest.mark.parametrize(
    ("arch", "width", "descriptors", "product"),
    [
        (89, 100, False, "e4m3"),
        (90, 576, True, ".e4m3.e4m3"),
        (90, 100, False, ".e4m3.e4m3"),
        (100, 576, True, "f8f6f4"),
    ],
)
def test_8_bits_compile_without_a_gpu(monkeypatch, tmp_path, arch, width, descriptors, product):
    *arguments, row_scale, column_scale = make_fp8_case(256, 49152, width, dtype=torch.bfloat16)
    monkeypatch.setattr(kernels, "multiplies_fp8", lambda device: True)

    def call():
        kernels.score_partials_triton(*arguments, 2048, row_scale, column_scale, DESCRIPTORS=descriptors)

    (kernel,) = binaries_for(monkeypatch, tmp_path, arch, [(kernels, "_score_kernel")], call)
    assert product in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 232448
