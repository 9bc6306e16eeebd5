"""The expert kernels on a GPU: parity with float64 over routings and sizes, no waiting for the device, compiled."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ops import test_moe_clamped as clamped
from ops.test_moe import check, check_permutation, expected, make_case, run
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from cggr_compile import PersistentTRMLP, lowerings
from cggr_compile.kernels import moe_tiles, moe_weight_gradient
from cggr_compile.ops.moe import moe
from cggr_compile.ops.moe_clamped import moe_clamped
from cggr_compile.ops.moe_routing import moe_permute, moe_top_experts, moe_top_experts_reference

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}


@pytest.fixture(autouse=True)
def nothing_synchronises():
    torch.zeros((), device="cuda")
    yield
    torch.cuda.set_sync_debug_mode("default")


def run_without_waiting(case, grad, run=run):
    run(case, grad)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    got = run(case, grad)
    torch.cuda.set_sync_debug_mode("default")
    return got


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("routing", ["random", "one", "null", "nobody", "gaps"])
def test_routings(routing, dtype):
    case = make_case(1000, 256, 192, 6, 2, routing=routing, dtype=dtype, device="cuda")
    grad = torch.randn_like(case[0])
    check(run_without_waiting(case, grad), expected(*case, grad), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "experts", "top_k"),
    [(1, 64, 64, 1, 1), (5, 33, 17, 3, 3), (777, 100, 36, 4, 1), (3000, 512, 256, 64, 8), (2048, 1024, 768, 8, 2)],
)
def test_sizes(tokens, hidden, inner, experts, top_k, dtype):
    case = make_case(tokens, hidden, inner, experts, top_k, dtype=dtype, device="cuda")
    grad = torch.randn_like(case[0])
    check(run(case, grad), expected(*case, grad), TOLERANCE[dtype])


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("descriptors", [False, True])
def test_ways_of_loading(monkeypatch, descriptors, gather, flatten):
    if descriptors and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no tensor descriptors before Hopper")
    original = moe_tiles.configuration

    def configuration(kernel, dtype, columns=0):
        ways = dict(DESCRIPTORS=descriptors, FLATTEN=flatten)
        ways |= dict(GATHER=gather) if kernel in ("swiglu", "swiglu_backward") else {}
        return original(kernel, dtype, columns) | (ways if not kernel.startswith("d_") or kernel == "d_hidden" else {})

    monkeypatch.setattr(moe_tiles, "configuration", configuration)
    case = make_case(3000, 256, 384, 8, 2, routing="null", dtype=torch.bfloat16, device="cuda")
    grad = torch.randn_like(case[0])
    check(run(case, grad), expected(*case, grad), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("routing", ["random", "one", "null", "nobody", "gaps"])
@pytest.mark.parametrize(("hidden", "inner"), [(512, 2048), (520, 2056)])  # tiles that are full, and that are cut
def test_wide_experts(hidden, inner, routing):
    """Rows gathered before, gate and up as one product; each expert's last tile is stored by TMA up to its end."""
    case = make_case(3000, hidden, inner, 6, 2, routing=routing, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn_like(case[0])
    torch.full((1 << 26,), torch.nan, device="cuda", dtype=torch.bfloat16)  # what later allocations find
    check(run_without_waiting(case, grad), expected(*case, grad), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("descriptors", [False, True])
def test_both_kernels_of_weight_gradients(monkeypatch, descriptors):
    if descriptors and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no tensor descriptors before Hopper")
    called = []
    original = moe_weight_gradient.ragged
    monkeypatch.setattr(moe_weight_gradient, "ragged", lambda *a: called.append(1) or original(*a))
    if not descriptors:
        monkeypatch.setattr(moe_weight_gradient, "has_descriptors", lambda _: False)
    case = make_case(3000, 520, 392, 6, 2, routing="gaps", dtype=torch.bfloat16, device="cuda")
    grad = torch.randn_like(case[0])
    check(run(case, grad), expected(*case, grad), TOLERANCE[torch.bfloat16])
    assert len(called) == 4 * descriptors, "both factors of two gradients"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("routing", ["random", "one", "null", "nobody", "gaps"])
def test_clamped_experts_with_biases(monkeypatch, routing, dtype):
    if dtype != torch.float32:
        monkeypatch.setattr(clamped, "LIMIT", clamped.NO_LIMIT)
    case = clamped.make_case(1000, 256, 192, 6, 2, routing=routing, dtype=dtype, device="cuda")
    grad = torch.randn_like(case[0])
    got = run_without_waiting(case, grad, clamped.run)
    clamped.check_norms(got, clamped.expected(*case, grad), TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", [(5, 33, 17, 3, 3), (3000, 512, 256, 32, 4), (2048, 2880, 2880, 4, 2)])
def test_clamped_sizes(monkeypatch, sizes):
    monkeypatch.setattr(clamped, "LIMIT", clamped.NO_LIMIT)
    case = clamped.make_case(*sizes, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn_like(case[0])
    clamped.check_norms(clamped.run(case, grad), clamped.expected(*case, grad), TOLERANCE[torch.bfloat16])


def test_the_same_bits_every_time():
    case = make_case(3000, 256, 384, 8, 4, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn_like(case[0])
    first, second = run(case, grad), run(case, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 1, 1), (16384, 8, 2), (5001, 128, 8), (300, 300, 20)])
def test_routing(tokens, experts, top_k):
    scores = torch.randint(0, 50, (tokens, experts), device="cuda").float()
    chosen = moe_top_experts(scores, top_k)
    assert torch.equal(chosen, moe_top_experts_reference(scores, top_k))
    check_permutation(moe_permute(chosen, experts), chosen, experts)


@pytest.mark.parametrize("compiled", [False, True])
def test_layer_equals_itself_on_the_cpu(compiled):
    torch.manual_seed(0)
    layer = PersistentTRMLP(64, 48, 5, 2, z_loss_weight=0.001)
    x, mask = torch.randn(2, 50, 64), torch.rand(2, 50) < 0.6
    wanted, got = [], []
    for device, into in (("cpu", wanted), ("cuda", got)):
        layer.to(device)
        layer.zero_grad()
        call = torch.compile(layer, fullgraph=True) if compiled and device == "cuda" else layer
        output, aux_loss = call(x.to(device), mask=mask.to(device))
        (output.square().sum() + aux_loss).backward()
        found = (output.detach(), aux_loss.detach(), *(p.grad for p in layer.parameters()))
        into += [tensor.clone().cpu() for tensor in found]  # layer.to moves gradients too
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


CALL, TEMPLATE, LIBRARY = "= torch.ops.cggr.moe_mlp", "^triton_cggr_moe", "_library$"


@pytest.mark.parametrize("routing", ["random", "one", "null", "gaps"])
@pytest.mark.parametrize("choices", [TEMPLATE, LIBRARY, "^cggr_moe_.*(?<!_library)$", None])
def test_under_max_autotune(choices, routing):
    """Of the steps' choices those of these names; None: whatever is fastest."""
    if choices == LIBRARY and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("a choice on Hopper only")
    case = make_case(2000, 256, 384, 6, 2, routing=routing, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn_like(case[0])
    lowerings.register()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *tensors: moe(*tensors))

    def step(case, grad):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in case[:4]]
        out = compiled(*leaves, case[4])
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    options = {"max_autotune_gemm": True, "force_disable_caches": True}
    with config.patch({**options, "test_configs.autotune_choice_name_regex": choices}):
        _, codes = run_and_get_code(step, case, grad)
        found = run_without_waiting(case, grad, step)
    assert len(codes) == 2 and not any(CALL in code for code in codes)
    templates = [code.count("async_compile.triton('triton_tem") for code in codes]
    assert choices is None or templates == ([2, 4] if choices == TEMPLATE else [0, 0])
    check(found, expected(*case, grad), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(
    ("sizes", "routing", "transposed"),
    [((2000, 256, 384, 6, 2), "null", True), ((2000, 256, 384, 6, 2), "gaps", False)],
)
@pytest.mark.parametrize("choices", [TEMPLATE, LIBRARY, "^cggr_moe_.*(?<!_library)$", None])
def test_clamped_experts_under_max_autotune(monkeypatch, choices, sizes, routing, transposed):
    """As :func:`test_under_max_autotune`."""
    if choices == LIBRARY and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("a choice on Hopper only")
    monkeypatch.setattr(clamped, "LIMIT", clamped.NO_LIMIT)
    case = clamped.make_case(*sizes, routing=routing, transposed=transposed, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn_like(case[0])
    lowerings.register()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *tensors: moe_clamped(*tensors, clamped.ALPHA, clamped.NO_LIMIT))

    def step(case, grad):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in case[:6]]
        out = compiled(*leaves, case[6])
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    options = {"max_autotune_gemm": True, "force_disable_caches": True}
    with config.patch({**options, "test_configs.autotune_choice_name_regex": choices}):
        _, codes = run_and_get_code(step, case, grad)
        found = run_without_waiting(case, grad, step)
    assert len(codes) == 2 and not any("= torch.ops.cggr.moe_clamped_mlp" in code for code in codes)
    templates = [code.count("async_compile.triton('triton_tem") for code in codes]
    assert choices is None or templates == ([2, 4] if choices == TEMPLATE else [0, 0])
    clamped.check_norms(found, clamped.expected(*case, grad), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("kernel", ["swiglu", "down", "swiglu_backward", "d_hidden", "d_gate_up", "d_down"])
def test_every_tile(monkeypatch, kernel):
    """Of those that the card has the memory for."""
    errors = pytest.importorskip("triton.runtime.errors")
    case = make_case(1500, 512, 384, 4, 2, routing="null", dtype=torch.bfloat16, device="cuda")
    grad = torch.randn_like(case[0])
    wanted, ran = expected(*case, grad), 0
    original = moe_tiles.configuration
    for tile in moe_tiles.configurations(kernel):
        monkeypatch.setattr(
            moe_tiles,
            "configuration",
            lambda name, *rest, tile=tile: tile if name == kernel else original(name, *rest),
        )
        try:
            found = run(case, grad)
        except errors.OutOfResources:
            continue
        check(found, wanted, TOLERANCE[torch.bfloat16])
        ran += 1
    assert ran > 1
