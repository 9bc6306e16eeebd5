"""The Triton kernels that route tokens, without a GPU: interpreted for their numbers, compiled for fit."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from ops.test_moe import check_permutation, make_case  # noqa: E402
from triton_harness import binaries_for, compiled, interpreted  # noqa: E402

from cggr_compile.kernels import moe_routing as kernels  # noqa: E402
from cggr_compile.ops.moe_routing import moe_top_experts_reference  # noqa: E402


@interpreted
@pytest.mark.parametrize("routing", ["random", "one", "null", "nobody", "gaps"])
def test_permutation(routing):
    chosen = make_case(50, 2, 1, 8, 2, routing=routing)[4]
    for dtype in (torch.int64, torch.int32):
        check_permutation(kernels.permute_triton(chosen.to(dtype), 8, 16), chosen, 8)


@interpreted
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "chunk"),
    [(0, 3, 2, 16), (1, 1, 1, 16), (7, 3, 3, 16), (200, 40, 3, 32), (90, 130, 8, 1024)],
)
def test_permutation_sizes(tokens, experts, top_k, chunk):
    chosen = make_case(tokens, 2, 1, experts, top_k, routing="null")[4]
    check_permutation(kernels.permute_triton(chosen, experts, chunk), chosen, experts)


@interpreted
def test_the_comparison_can_fail():
    chosen = make_case(50, 2, 1, 8, 2)[4]
    with pytest.raises(AssertionError):
        check_permutation(kernels.permute_triton(chosen.flip(0), 8, 16), chosen, 8)


@interpreted
def test_permutation_of_a_view():
    chosen = make_case(20, 2, 1, 6, 2)[4]
    view = torch.stack([chosen, chosen], -1)[..., 0]
    check_permutation(kernels.permute_triton(view, 6, 16), chosen, 6)


@interpreted
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(0, 3, 2), (1, 1, 1), (33, 5, 5), (40, 64, 8), (9, 130, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_top_experts(tokens, experts, top_k, dtype):
    for scores in (torch.randn(tokens, experts), torch.randint(0, 3, (tokens, experts)), torch.zeros(tokens, experts)):
        scores = scores.to(dtype)
        wanted = moe_top_experts_reference(scores, top_k)
        assert torch.equal(kernels.top_experts_triton(scores, top_k), wanted)
        assert torch.equal(kernels.top_experts_triton(scores.t().contiguous().t(), top_k), wanted)


@interpreted
def test_top_experts_without_order():
    """Infinities are compared as ever; whatever NaN does, experts are distinct and exist."""
    scores = torch.full((4, 6), -torch.inf)
    scores[1, 3] = torch.inf
    assert kernels.top_experts_triton(scores, 3).tolist() == [[0, 1, 2], [3, 0, 1], [0, 1, 2], [0, 1, 2]]
    scores[2], scores[3, 1::2] = torch.nan, torch.nan
    for row in kernels.top_experts_triton(scores, 6).tolist():
        assert sorted(row) == list(range(6))


@compiled
@pytest.mark.parametrize(("arch", "experts", "top_k"), [(80, 8, 2), (90, 1, 1), (90, 128, 8), (100, 384, 6)])
def test_compiles_without_a_gpu(monkeypatch, tmp_path, arch, experts, top_k):
    names = ["_top_experts_kernel", "_count_kernel", "_place_kernel"]

    def call():
        chosen = kernels.top_experts_triton(torch.randn(300, experts), top_k)
        kernels.permute_triton(chosen, experts)

    binaries = binaries_for(monkeypatch, tmp_path, arch, [(kernels, name) for name in names], call)
    assert [kernel.metadata.name for kernel in binaries] == names
    for kernel in binaries:
        assert kernel.asm["cubin"].startswith(b"\x7fELF") and f".target sm_{arch}" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= 49152
