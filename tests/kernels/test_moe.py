"""The Triton kernels of ``moe_mlp`` without a GPU: interpreted for their numbers, compiled for fit."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from ops.test_moe import check, expected, make_case  # noqa: E402
from triton_harness import (  # noqa: E402
    binaries_for,
    compiled,
    interpreted,
    poison_empty_memory,
)

from cggr_compile.kernels import moe as kernels  # noqa: E402
from cggr_compile.kernels import moe_gather as gathers  # noqa: E402
from cggr_compile.kernels import moe_products as products  # noqa: E402
from cggr_compile.kernels import moe_weight_gradient as sums  # noqa: E402
from cggr_compile.ops.moe_routing import moe_permute  # noqa: E402

ROWS, GROUPED = ["swiglu", "down", "swiglu_backward", "d_hidden"], ["d_gate_up", "d_down"]
GROUPED_KERNELS = [
    (products, "_schedule_kernel"),
    (products, "_rows_kernel"),
    (sums, "_weight_gradient_kernel"),
    (sums, "_streamed_weight_gradient_kernel"),
    (gathers, "_gather_rows_kernel"),
]
SMALL = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, GROUP=2)


def run(case, grad, **overrides):
    """(out, gradients) by the kernels alone. ``overrides``: of every kernel."""
    hidden, gate_up, down, weights, experts = case
    permuted = moe_permute(experts, gate_up.shape[0])
    grouped = {name: value for name, value in overrides.items() if name.startswith(("BLOCK", "GROUP", "num"))}
    by_kernel = dict.fromkeys(ROWS, overrides) | dict.fromkeys(GROUPED, grouped)
    out, inner = kernels.moe_mlp_triton(hidden, gate_up, down, weights, *permuted, True, by_kernel)
    return out, *kernels.moe_mlp_backward_triton(grad, *case[:4], inner, *permuted, by_kernel)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_empty_memory(monkeypatch)


@interpreted
@pytest.mark.parametrize("routing", ["random", "one", "null", "nobody", "gaps"])
@pytest.mark.parametrize("descriptors", [False, True])
def test_routings(routing, descriptors):
    case = make_case(44, 40, 24, 3, 2, routing=routing)
    grad = torch.randn_like(case[0])
    check(run(case, grad, **SMALL, DESCRIPTORS=descriptors), expected(*case, grad), 1e-5)


@interpreted
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "experts", "top_k"),
    [(1, 16, 16, 1, 1), (3, 5, 7, 2, 2), (30, 33, 17, 3, 3), (9, 32, 16, 9, 4), (0, 8, 8, 2, 1), (40, 16, 100, 1, 1)],
)
def test_sizes(tokens, hidden, inner, experts, top_k):
    case = make_case(tokens, hidden, inner, experts, top_k)
    grad = torch.randn_like(case[0])
    check(run(case, grad, **SMALL), expected(*case, grad), 1e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype):
    case = make_case(40, 64, 48, 3, 2, dtype=dtype, routing="null")
    grad = torch.randn_like(case[0])
    got = run(case, grad, **SMALL)
    assert [t.dtype for t in got] == [dtype] * 4 + [torch.float32]
    check(got, expected(*case, grad), 3e-2)
    check(run(case, grad), expected(*case, grad), 3e-2)  # tiles as on a device


@interpreted
def test_rows_gathered_before():
    case = make_case(44, 40, 24, 3, 2, routing="null")
    grad = torch.randn_like(case[0])
    check(run(case, grad, GATHER=False, **SMALL), expected(*case, grad), 1e-5)


@interpreted
@pytest.mark.parametrize(("sizes", "routing"), [((64, 48), "null"), ((40, 24), "gaps")])
def test_loads_and_stores_by_tma(sizes, routing):
    """All of it: gate and up as one product, stores up to an expert's end, weight gradients of gathered rows."""
    case = make_case(30, *sizes, 3, 2, routing=routing)
    grad = torch.randn_like(case[0])
    by_kernel = {name: SMALL | dict(DESCRIPTORS=True) for name in (*ROWS, *GROUPED)}
    for name in ROWS[::2]:
        by_kernel[name] |= dict(GATHER=False)
    permuted = moe_permute(case[4], 3)
    out, inner = kernels.moe_mlp_triton(*case[:4], *permuted, True, by_kernel)
    got = kernels.moe_mlp_backward_triton(grad, *case[:4], inner, *permuted, by_kernel)
    check((out, *got), expected(*case, grad), 1e-5)


@interpreted
def test_programs_do_not_matter():
    case = make_case(20, 20, 24, 3, 2)
    grad = torch.randn_like(case[0])
    first, *others = (run(case, grad, PROGRAMS=programs, **SMALL) for programs in (1, 2, 200))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@interpreted
def test_the_sweep_compares_every_kernel():
    import moe_problem
    import moe_sweep
    from moe_arms import Shape

    problem = moe_problem.Problem(Shape(24, 16, 3, 2, 20), "cpu")
    for kernel in moe_problem.KERNELS:
        wanted = problem.reference(kernel)
        assert moe_sweep.attempt(problem, kernel, SMALL, wanted) < moe_sweep.TOLERANCE, kernel
        assert moe_sweep.attempt(problem, kernel, SMALL | {"GATHERED": True}, wanted) < moe_sweep.TOLERANCE, kernel
        wrong = [*wanted[:-1], wanted[-1].roll(1, 0)]
        assert moe_sweep.attempt(problem, kernel, SMALL, wrong) > moe_sweep.TOLERANCE, kernel


@interpreted
def test_strides():
    case = make_case(20, 16, 8, 3, 2)
    grad = torch.ones(()).expand(case[0].shape)  # the gradient of a sum
    hidden, gate_up, down, weights, experts = case
    views = (
        hidden.t().contiguous().t(),
        torch.cat([gate_up, gate_up], 2)[..., :16],
        down.mT.contiguous().mT,
        weights.t().contiguous().t(),
        experts,
    )
    check(run(views, grad, **SMALL), expected(*case, grad), 1e-5)


@interpreted
def test_the_comparison_can_fail():
    case = make_case(44, 40, 24, 3, 2)
    grad = torch.randn_like(case[0])
    with pytest.raises(AssertionError):
        check(run((*case[:4], case[4].flip(0)), grad, **SMALL), expected(*case, grad), 1e-5)


@compiled
@pytest.mark.parametrize(
    ("arch", "shared_memory", "sizes", "dtype"),
    [
        (80, 166912, (2048, 768, 4, 2), torch.bfloat16),
        (80, 166912, (1024, 4096, 4, 2), torch.bfloat16),
        (90, 232448, (2048, 768, 4, 2), torch.bfloat16),
        pytest.param(90, 232448, (1024, 4096, 4, 2), torch.bfloat16, marks=pytest.mark.slow),
        (100, 232448, (2048, 768, 4, 2), torch.bfloat16),
        (90, 232448, (100, 36, 3, 1), torch.float16),  # no multiples of the tiles, nor of what TMA needs
        (80, 166912, (64, 64, 2, 2), torch.float32),
        (90, 232448, (64, 64, 2, 2), torch.float32),
    ],
)
def test_compiles_without_a_gpu(monkeypatch, tmp_path, arch, shared_memory, sizes, dtype):
    hidden, *_ = case = make_case(300, *sizes, dtype=dtype)
    descriptors = arch >= 90 and sizes[0] % 64 == 0
    for module in (products, sums):
        monkeypatch.setattr(module, "has_descriptors", lambda tensor: descriptors)
    binaries = binaries_for(
        *(monkeypatch, tmp_path, arch, GROUPED_KERNELS),
        lambda: monkeypatch.setattr(kernels, "combine", lambda *_: hidden) or run(case, hidden),
    )
    binaries = [kernel for kernel in binaries if kernel.metadata.name != "_gather_rows_kernel"]
    assert len(binaries) == 8
    for kernel in binaries:
        assert kernel.asm["cubin"].startswith(b"\x7fELF") and f".target sm_{arch}" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= shared_memory
        assert dtype != torch.float32 or "cp.async.bulk" not in kernel.asm["ptx"]
        multiplies = kernel.metadata.name != "_schedule_kernel"
        assert ("mma" in kernel.asm["ptx"]) == (multiplies and dtype != torch.float32)
