"""The products of gpt-oss's experts as Inductor renders them, and the choice between them and operators."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from lowerings.test_moe import LIBRARY, PLAIN, TEMPLATE  # noqa: E402
from lowerings.test_moe import choose as choose_products  # noqa: E402, F401
from ops import test_moe_clamped as clamped  # noqa: E402
from ops.test_moe_clamped import ALPHA, LIMIT, NO_LIMIT, check, expected, make_case  # noqa: E402
from template_harness import code_of, interpreted_results, load, templates_of  # noqa: E402
from torch._inductor import config  # noqa: E402
from torch._inductor.utils import run_and_get_code  # noqa: E402
from triton_harness import binaries_for  # noqa: E402

from cggr_compile import compat, lowerings  # noqa: E402
from cggr_compile.kernels import moe_tiles  # noqa: E402
from cggr_compile.lowerings import moe_clamped as lowering  # noqa: E402
from cggr_compile.ops.moe_clamped import moe_clamped, moe_clamped_mlp, moe_clamped_mlp_backward  # noqa: E402
from cggr_compile.ops.moe_routing import moe_permute  # noqa: E402

pytestmark = pytest.mark.skipif(compat.cpp_compiler() is None, reason="needs a C++ compiler")

CALL = "= torch.ops.cggr.moe_clamped_mlp"


@pytest.fixture
def choose(choose_products, monkeypatch):  # noqa: F811
    monkeypatch.setattr(lowering, "serves", lambda *_: True)
    return choose_products


def codes_of(case, grad, inner, save=True, limit=LIMIT):
    """Generated code of the forward and of the backward, with the tensors it takes."""
    permuted = moe_permute(case[6], case[1].shape[0])
    forward, backward = (*case[:6], *permuted), (grad, *case[:6], inner, *permuted)
    return [
        (code_of(lambda *tensors: moe_clamped_mlp(*tensors, ALPHA, limit, save), *forward), forward),
        (code_of(lambda *tensors: moe_clamped_mlp_backward(*tensors, ALPHA, limit), *backward), backward),
    ]


def test_numbers(choose, monkeypatch, tmp_path):
    """What Inductor wrote, interpreted: rows of no expert, partial tiles, descriptors, matrices stored either way."""
    monkeypatch.setattr(clamped, "LIMIT", NO_LIMIT)
    cases = [
        (make_case(70, 40, 136, 3, 2, routing="null", dtype=torch.float16), False),
        (make_case(150, 32, 48, 4, 1, routing="gaps", dtype=torch.float16, transposed=False), True),
    ]
    codes, grads = [], []
    for case, descriptors in cases:
        choose(TEMPLATE, descriptors=descriptors)
        grads.append(torch.randn_like(case[0]))
        inner = moe_clamped_mlp(*case[:6], *moe_permute(case[6], case[1].shape[0]), ALPHA, NO_LIMIT, True)[1]
        pair = codes_of(case, grads[-1], inner, limit=NO_LIMIT)
        assert [len(templates_of(code)) for code, _ in pair] == [2, 4]
        for code, _ in pair:
            assert CALL not in code and ("make_tensor_descriptor" in code) == descriptors
        codes += pair
    results = interpreted_results(codes, tmp_path)
    for number, (case, _) in enumerate(cases):
        got = (results[2 * number][0], *results[2 * number + 1])
        wanted = expected(*case, grads[number])
        check(got, wanted, 4e-3)
        with pytest.raises(AssertionError):
            check((got[0].flip(0), *got[1:]), wanted, 4e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "descriptors"), [(80, False), (90, True), (100, True)])
def test_compiles_without_a_gpu(choose, monkeypatch, tmp_path, arch, descriptors):
    """The first of the tile sizes of the products that have a bias or gather a gradient."""
    first = moe_tiles.configurations
    choose(TEMPLATE, tiles=lambda kernel: first(kernel)[:1], descriptors=descriptors)
    case = make_case(300, 1024, 512, 4, 2, dtype=torch.bfloat16)
    codes = codes_of(case, torch.empty_like(case[0]), torch.empty(600, 1024, dtype=torch.bfloat16))
    types = {"OFFSETS": torch.int32, "QUEUE": torch.int32, "ORDER": torch.int32}
    seen, tile = [], moe_tiles.configurations("inner")[0]
    for (code, _), count in zip(codes, (2, 1), strict=True):  # the backward's others are those of ``moe_mlp``
        for name, (text, programs) in [*templates_of(code).items()][:count]:
            module = load(text, tmp_path / f"{name}_{len(seen)}.py")
            names = text.split(f"def {name}(", 1)[1].split(")", 1)[0].split(", ")
            assert ("arg_BIAS" in names) == (count == 2)
            tensors = [torch.empty(16, dtype=types.get(n.removeprefix("arg_"), torch.bfloat16)) for n in names]

            def call(module=module, name=name, programs=programs, tensors=tensors):
                getattr(module, name)[(programs,)](*tensors, num_warps=tile["num_warps"], num_stages=tile["num_stages"])

            seen += binaries_for(monkeypatch, tmp_path, arch, [(module, name)], call)
    assert len(seen) == 3
    for kernel in seen:
        assert kernel.asm["cubin"].startswith(b"\x7fELF") and "mma" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= (166912 if arch == 80 else 232448)
        assert ("cp.async.bulk.tensor" in kernel.asm["ptx"]) == descriptors


@pytest.mark.parametrize(
    ("pattern", "routing", "transposed"),
    [(PLAIN, "null", True), pytest.param(LIBRARY, "random", False, marks=pytest.mark.slow)],
)
def test_operators_are_choices(choose, pattern, routing, transposed):
    """Through autograd, as it runs; of the step's two ways the CPU has one."""
    case = make_case(30, 16, 24, 3, 2, routing=routing, transposed=transposed)
    grad = torch.randn_like(case[0])
    choose(pattern, tiles=lambda kernel: [])
    leaves = [tensor.requires_grad_() for tensor in case[:6]]

    def step():
        found = torch.compile(lambda *tensors: moe_clamped(*tensors, case[6], ALPHA, LIMIT))(*leaves)
        found.backward(grad)
        return found

    with config.patch(cpu_backend="cpp"):
        found, codes = run_and_get_code(step)
    assert len(codes) == 2 and not any(CALL in code for code in codes)
    grads = [leaf.grad for leaf in leaves]
    assert all(a.stride() == b.stride() for a, b in zip(grads, leaves, strict=True))
    check((found.detach(), *grads), expected(*(t.detach() for t in case), grad), 1e-5)


def test_one_call_without_max_autotune(monkeypatch):
    lowerings.register()
    torch._dynamo.reset()
    monkeypatch.setattr(compat, "autotune", None)
    case = make_case(20, 16, 24, 3, 2)
    with config.patch(force_disable_caches=True):
        for code, _ in codes_of(case, torch.empty_like(case[0]), torch.empty(40, 48)):
            assert CALL in code
