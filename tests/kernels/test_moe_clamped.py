"""The Triton kernels of ``moe_clamped_mlp`` without a GPU: interpreted for their numbers, compiled for fit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ops import test_moe_clamped as clamped
from ops.test_moe_clamped import ALPHA, check, expected, make_case
from triton_harness import (
    binaries_for,
    compiled,
    interpreted,
    poison_empty_memory,
)

from cggr_compile.kernels import moe_clamped as kernels
from cggr_compile.kernels import moe_gather as gathers
from cggr_compile.kernels import moe_products as products
from cggr_compile.kernels import moe_weight_gradient as sums
from cggr_compile.ops.moe_routing import moe_permute

SMALL = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, GROUP=2)
PRODUCTS = ["inner", "down", "d_activation", "d_hidden", "d_gate_up", "d_down"]


def run(case, grad, **overrides):
    """(out, gradients) by the kernels alone. ``overrides``: of the products."""
    permuted = moe_permute(case[6], case[1].shape[0])
    by_kernel = {name: {**overrides} for name in PRODUCTS}
    for name in PRODUCTS[-2:]:
        by_kernel[name].pop("DESCRIPTORS", None)
    numbers = (*permuted, ALPHA, clamped.LIMIT)
    out, inner = kernels.moe_clamped_mlp_triton(*case[:6], *numbers, True, by_kernel)
    return out, *kernels.moe_clamped_mlp_backward_triton(grad, *case[:6], inner, *numbers, by_kernel)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_empty_memory(monkeypatch)


@interpreted
@pytest.mark.parametrize(
    ("routing", "transposed"),
    [("random", False), ("random", True), ("one", True), ("null", True), ("nobody", True), ("gaps", False)],
)
def test_routings(routing, transposed):
    case = make_case(44, 40, 24, 3, 2, routing=routing, transposed=transposed)
    grad = torch.randn_like(case[0])
    got = run(case, grad, **SMALL, DESCRIPTORS=False)
    check(got, expected(*case, grad), 1e-5)
    assert all(a.stride() == b.stride() for a, b in zip(got[1:], case[:6], strict=True))


@interpreted
@pytest.mark.parametrize(
    ("sizes", "descriptors"),
    [
        ((1, 16, 16, 1, 1), True),
        ((30, 33, 17, 3, 3), False),
        ((0, 8, 8, 2, 1), False),
        ((5, 144, 136, 2, 1), True),
        ((5, 144, 136, 2, 1), False),
    ],
)
def test_sizes(sizes, descriptors):
    case = make_case(*sizes)
    grad = torch.randn_like(case[0])
    check(run(case, grad, **SMALL, DESCRIPTORS=descriptors), expected(*case, grad), 1e-5)


@interpreted
def test_float16(monkeypatch):
    monkeypatch.setattr(clamped, "LIMIT", clamped.NO_LIMIT)
    case = make_case(40, 64, 48, 3, 2, dtype=torch.float16, routing="null")
    grad = torch.randn_like(case[0])
    got = run(case, grad)  # tiles as on a device
    assert [t.dtype for t in got] == [torch.float16] * 6 + [torch.float32]
    check(got, expected(*case, grad), 3e-2)


@interpreted
def test_what_is_no_number_stays_so():
    case = make_case(8, 16, 16, 1, 1)
    case[0][3] = torch.nan
    out = run(case, torch.randn_like(case[0]), **SMALL)[0]
    assert out[3].isnan().all() and out.isfinite().all(1).sum() == 7


@compiled
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_without_a_gpu(monkeypatch, tmp_path, arch):
    case = make_case(300, 2048, 768, 4, 2, dtype=torch.bfloat16)
    for module in (products, sums):
        monkeypatch.setattr(module, "has_descriptors", lambda tensor: arch >= 90)
    monkeypatch.setattr(kernels, "combine", lambda *_: case[0])
    launched = [(kernels, f"_{name}_kernel") for name in ("activation", "activation_backward", "expert_sums")]
    launched += [(products, "_schedule_kernel"), (products, "_rows_kernel"), (gathers, "_gather_rows_kernel")]
    launched += [(sums, "_weight_gradient_kernel"), (sums, "_streamed_weight_gradient_kernel")]
    binaries = binaries_for(monkeypatch, tmp_path, arch, launched, lambda: run(case, case[0]))
    binaries = [kernel for kernel in binaries if kernel.metadata.name != "_gather_rows_kernel"]
    assert len(binaries) == 12
    for kernel in binaries:
        assert kernel.asm["cubin"].startswith(b"\x7fELF") and f".target sm_{arch}" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= (166912 if arch == 80 else 232448)
