"""SwiGLU between the library's products, interpreted, against the steps on the CPU; compiled without a GPU."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from triton_harness import binaries_for, compiled, interpreted  # noqa: E402

from cggr_compile.kernels import moe_gate as kernels  # noqa: E402
from cggr_compile.ops.moe_steps import moe_swiglu, moe_swiglu_backward  # noqa: E402


def make_case(rows, routed, width):
    """One expert, whose matrices are the identity: then the products are what goes in. NaN for rows without it."""
    inner, grad = torch.randn(rows, 2 * width), torch.randn(rows, width)
    inner[routed:] = grad[routed:] = torch.nan
    order, offsets = torch.randperm(rows).int(), torch.tensor([0, routed]).int()
    return inner, grad, torch.rand(rows, 1), order, offsets


@interpreted
@pytest.mark.parametrize(("rows", "routed", "width"), [(40, 33, 136), (16, 16, 128), (5, 0, 8)])
def test_forward(rows, routed, width):
    inner, _, _, _, offsets = make_case(rows, routed, width)
    out = torch.full((rows, width), torch.nan)
    kernels.gate_triton(inner, out, offsets)
    in_order = torch.arange(rows, dtype=torch.int32)
    wanted = moe_swiglu(inner, torch.eye(2 * width)[None], in_order, offsets, None, 1, True)
    torch.testing.assert_close(out[:routed], wanted[:routed])
    assert out[routed:].isnan().all()


@interpreted
@pytest.mark.parametrize(("rows", "routed", "width"), [(40, 33, 136), (16, 16, 128), (5, 0, 8)])
def test_backward(rows, routed, width):
    inner, grad, weights, order, offsets = make_case(rows, routed, width)

    def empty():
        return torch.full((rows, 2 * width), torch.nan), torch.full((rows, width), torch.nan)

    d_inner, weighted = empty()
    parts = torch.full((triton.cdiv(width, 128), rows), torch.nan)
    kernels.gate_backward_triton(grad, inner, weights, order, offsets, weighted, d_inner, parts)
    wanted_d_inner, wanted_weighted = empty()
    by_token = torch.empty_like(grad)
    by_token[order.long()] = grad
    wanted = moe_swiglu_backward(
        by_token, torch.eye(width)[None], order, offsets, inner, weights, wanted_d_inner, wanted_weighted, 1, True
    )
    for a, b in ((d_inner, wanted_d_inner), (weighted, wanted_weighted), (parts.sum(0), wanted.sum(0))):
        torch.testing.assert_close(a[:routed], b[:routed])
        assert a[routed:].isnan().all()


@compiled
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_without_a_gpu(monkeypatch, tmp_path, arch):
    inner, grad, weights, order, offsets = make_case(40, 40, 256)

    def call():
        kernels.gate_triton(inner, torch.empty_like(grad), offsets)
        kernels.gate_backward_triton(
            *(grad, inner, weights, order, offsets), torch.empty_like(grad), torch.empty_like(inner), torch.empty(2, 40)
        )

    launched = [(kernels, "_gate_kernel"), (kernels, "_gate_backward_kernel")]
    binaries = binaries_for(monkeypatch, tmp_path, arch, launched, call)
    assert len(binaries) == 2 and all(kernel.asm["cubin"].startswith(b"\x7fELF") for kernel in binaries)
