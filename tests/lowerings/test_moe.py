"""The templates of the experts' products as Inductor renders them, and the choice between them and operators."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from ops.test_moe import check, expected, make_case  # noqa: E402
from template_harness import code_of, interpreted_results, load, pretend_to_time, templates_of  # noqa: E402
from torch._inductor import config  # noqa: E402
from torch._inductor.utils import run_and_get_code  # noqa: E402
from triton_harness import binaries_for  # noqa: E402

from cggr_compile import compat, lowerings  # noqa: E402
from cggr_compile.kernels import moe_products as products  # noqa: E402
from cggr_compile.kernels import moe_tiles  # noqa: E402
from cggr_compile.lowerings import moe as lowering  # noqa: E402
from cggr_compile.ops.moe import moe, moe_mlp, moe_mlp_backward  # noqa: E402
from cggr_compile.ops.moe_routing import moe_permute  # noqa: E402

pytestmark = pytest.mark.skipif(compat.cpp_compiler() is None, reason="needs a C++ compiler")

SMALL = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP=2, num_warps=4, num_stages=1)
TEMPLATE, LIBRARY, PLAIN = "^triton_cggr_moe", "^cggr_moe_.*_library$", "^cggr_moe_.*(?<!_library)$"
FORWARD, BACKWARD = ["swiglu", "down"], ["swiglu_backward", "d_hidden", "d_gate_up", "d_down"]
CALL = "= torch.ops.cggr.moe_mlp"


@pytest.fixture
def choose(monkeypatch):
    choice = pretend_to_time(monkeypatch)
    monkeypatch.setattr(lowering, "serves", lambda *_: True)
    monkeypatch.setattr(products, "library_takes", lambda *_: True)
    monkeypatch.setattr(products, "multiprocessors", lambda _: 2)

    def choose(pattern, tiles=None, descriptors=False):
        choice(pattern)
        monkeypatch.setattr(lowering, "tma_loads", lambda node, swapped=False: descriptors)
        monkeypatch.setattr(moe_tiles, "configurations", lambda kernel: (tiles or small)(kernel))

    with config.patch(force_disable_caches=True, cpu_backend="triton"):
        yield choose


def small(kernel):
    return [SMALL if kernel in ("d_gate_up", "d_down") else SMALL | dict(FLATTEN=True)]


def codes_of(case, grad, inner, save=True):
    """Generated code of the forward and of the backward, with the tensors it takes."""
    permuted = moe_permute(case[4], case[1].shape[0])
    forward, backward = (*case[:4], *permuted), (grad, *case[:4], inner, *permuted)
    return [
        (code_of(lambda *tensors: moe_mlp(*tensors, save), *forward), forward),
        (code_of(moe_mlp_backward, *backward), backward),
    ]


def inner_of(case):
    return moe_mlp(*case[:4], *moe_permute(case[4], case[1].shape[0]), True)[1]


def test_numbers(choose, tmp_path):
    """What Inductor wrote, interpreted, memory poisoned: rows of no expert, partial tiles, descriptors, a matrix
    that is stored the other way round."""
    cases = [
        (make_case(70, 40, 136, 3, 2, routing="null", dtype=torch.float16), False),
        (make_case(150, 32, 48, 4, 1, routing="gaps", dtype=torch.float16), True),
    ]
    down = cases[0][0][2]
    transposed = down.mT.contiguous().mT
    assert transposed.stride() != down.stride()
    cases[0] = ((*cases[0][0][:2], transposed, *cases[0][0][3:]), False)
    codes, grads = [], []
    for case, descriptors in cases:
        choose(TEMPLATE, descriptors=descriptors)
        grads.append(torch.randn_like(case[0]))
        pair = codes_of(case, grads[-1], inner_of(case))
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
def test_nothing_is_saved_without_a_gradient(choose, tmp_path):
    case = make_case(20, 32, 48, 3, 2, dtype=torch.float16)
    choose(TEMPLATE)
    code, tensors = codes_of(case, torch.empty_like(case[0]), inner_of(case), save=False)[0]
    ((out, inner),) = interpreted_results([(code, tensors)], tmp_path)
    assert inner.shape == (0, 96) and "INNER" not in code
    check((out,), expected(*case, case[0])[:1], 4e-3, ["out"])


@pytest.mark.parametrize(
    ("arch", "descriptors", "dtype", "sizes"),
    [
        (80, False, torch.bfloat16, (1024, 512)),
        (90, True, torch.bfloat16, (1024, 512)),
        (90, False, torch.float16, (1000, 520)),
        (100, True, torch.bfloat16, (1024, 512)),
    ],
)
def test_compiles_without_a_gpu(choose, monkeypatch, tmp_path, arch, descriptors, dtype, sizes):
    """The first of the tile sizes, in the template's place; the benchmark and the GPU's tests run all of them."""
    first = moe_tiles.configurations
    choose(TEMPLATE, tiles=lambda kernel: first(kernel)[:1], descriptors=descriptors)
    case = make_case(300, *sizes, 4, 2, dtype=dtype)
    inner = torch.empty(600, 2 * sizes[1], dtype=dtype)
    seen = []
    for code, _ in codes_of(case, torch.empty_like(case[0]), inner):
        for number, (name, (text, programs)) in enumerate(templates_of(code).items()):
            module = load(text, tmp_path / f"{name}_{len(seen)}.py")
            types = {"OFFSETS": torch.int32, "QUEUE": torch.int32, "ORDER": torch.int32, "WEIGHTS": torch.float32}
            names = text.split(f"def {name}(", 1)[1].split(")", 1)[0].split(", ")
            backward = "D_INNER" in text
            tensors = [torch.empty(16, dtype=types.get(n.removeprefix("arg_"), dtype)) for n in names[:-1]]
            tensors.append(torch.empty(16, dtype=torch.float32 if backward and "WEIGHTED" in text else dtype))
            tile = moe_tiles.configurations(([*FORWARD] if len(seen) < 2 else [*BACKWARD])[number])[0]

            def call(module=module, name=name, programs=programs, tensors=tensors, tile=tile):
                getattr(module, name)[(programs,)](*tensors, num_warps=tile["num_warps"], num_stages=tile["num_stages"])

            seen += binaries_for(monkeypatch, tmp_path, arch, [(module, name)], call)
    assert len(seen) == 6
    for kernel in seen:
        assert kernel.asm["cubin"].startswith(b"\x7fELF") and "mma" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= (166912 if arch == 80 else 232448)
    # the sums of outer products have none
    assert ["cp.async.bulk.tensor" in kernel.asm["ptx"] for kernel in seen] == [descriptors] * 4 + [False] * 2


def called(compiled, leaves, grad):
    found = compiled(*leaves)
    found.backward(grad)
    return found


@pytest.mark.parametrize("pattern", [LIBRARY, PLAIN])
@pytest.mark.parametrize("routing", ["random", "null"])
def test_operators_are_choices(choose, pattern, routing):
    """Through autograd, as it runs; of the step's two ways the CPU has one."""
    case = make_case(30, 16, 24, 3, 2, routing=routing)
    grad = torch.randn_like(case[0])
    choose(pattern, tiles=lambda kernel: [])
    leaves = [tensor.requires_grad_() for tensor in case[:4]]
    with config.patch(cpu_backend="cpp"):
        compiled = torch.compile(lambda *tensors: moe(*tensors, case[4]))
        (found, codes) = run_and_get_code(lambda: called(compiled, leaves, grad))
    assert len(codes) == 2 and not any(CALL in code for code in codes)
    check((found.detach(), *(leaf.grad for leaf in leaves)), expected(*(t.detach() for t in case), grad), 1e-5)


def test_one_call_without_max_autotune(monkeypatch):
    lowerings.register()
    torch._dynamo.reset()
    monkeypatch.setattr(compat, "autotune", None)
    case = make_case(20, 16, 24, 3, 2)
    with config.patch(force_disable_caches=True):
        for code, _ in codes_of(case, torch.empty_like(case[0]), inner_of(case)):
            assert CALL in code


def test_where_it_serves(monkeypatch):
    card = SimpleNamespace(timed=True, triton=True)
    monkeypatch.setattr(compat, "times_templates", lambda device, dtype: card.timed)
    monkeypatch.setattr(compat, "runs_our_kernels", lambda: card.triton)

    def serves(dtype=torch.bfloat16, tokens=300, hidden=64, inner=96, device="cuda"):
        def node(*shape):
            return SimpleNamespace(
                get_size=lambda: shape, get_dtype=lambda: dtype, get_device=lambda: torch.device(device)
            )

        return lowering.serves(node(tokens, hidden), node(4, 2 * inner, hidden), node(4, hidden, inner))

    assert serves() and serves(torch.float16)
    symbol = torch.utils._sympy.symbol.make_symbol(torch.utils._sympy.symbol.SymT.SIZE, 0)
    for refused in (
        *(dict(dtype=dtype) for dtype in (torch.float32, torch.float64)),
        *(dict(tokens=tokens) for tokens in (0, symbol)),
        dict(hidden=36),
        dict(inner=33),
        dict(device="cpu"),
    ):
        assert not serves(**refused), refused
    for name in ("timed", "triton"):
        setattr(card, name, False)
        assert not serves()
        setattr(card, name, True)
