"""The template of ``score_partials`` as Inductor renders it: interpreted for its numbers, compiled for fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from ops.test_score import make_case, make_fp8_case  # noqa: E402
from template_harness import code_of, interpreted_results, load, pretend_to_time, templates_of  # noqa: E402
from torch._inductor import config  # noqa: E402
from torch._inductor.utils import run_and_get_code  # noqa: E402
from triton_harness import binaries_for  # noqa: E402

from cggr_compile import compat, lowerings  # noqa: E402
from cggr_compile.kernels import common, head_product  # noqa: E402
from cggr_compile.lowerings import score as lowering  # noqa: E402
from cggr_compile.ops.score import FP8, score_partials, score_partials_reference  # noqa: E402

pytestmark = pytest.mark.skipif(compat.cpp_compiler() is None, reason="needs a C++ compiler")

SMALL = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, GROUP=2, num_warps=4, num_stages=1, PRECISION="'ieee'")
TEMPLATE, OPERATOR = "^triton_cggr_score", "^cggr_score"  # names of choices
CALL = "= torch.ops.cggr.score_partials"


@pytest.fixture
def choose(monkeypatch):
    choice = pretend_to_time(monkeypatch)

    def choose(pattern, tiles=SMALL, descriptors=False):
        configs = [tiles, {**tiles, "GROUP": 1}]
        choice(pattern, always=["cggr_score_partials"])  # the way out if no template works
        monkeypatch.setattr(lowering, "_configs", lambda *_: configs)
        monkeypatch.setattr(common, "tma_loads", lambda device, strides, width, offset: descriptors)

    with config.patch(force_disable_caches=True, cpu_backend="triton"):
        yield choose


def arguments_of(case, span, scales=()):
    return (*case[:3], *case[4:], span, *scales)


def tensors_of(arguments):
    return [a for a in arguments if isinstance(a, torch.Tensor)]


def generated(arguments, epilogue=lambda found: found):
    def function(*given):
        left = iter(given)
        return epilogue(score_partials(*(next(left) if isinstance(a, torch.Tensor) else a for a in arguments)))

    code = code_of(function, *tensors_of(arguments))
    assert CALL not in code
    return code


def test_numbers(choose, tmp_path):
    """What Inductor wrote, interpreted; outputs poisoned."""
    cases = []
    for rows, vocab, width, span, modes, descriptors in [
        (33, 70, 24, 32, dict(bias=True, softcap=2.0, scale=0.3), False),
        (40, 64, 32, 16, dict(dtype=torch.float16), True),
        (1, 10, 32, 16, dict(), True),
    ]:
        cases.append((arguments_of(make_case(rows, vocab, width, sharp=3.0, **modes), span), descriptors))
    *scaled, row_scale, column_scale = make_fp8_case(20, 70, 32, bias=True)
    cases.append(((*(t.float() for t in scaled[:3]), *scaled[3:], 32, row_scale, column_scale), False))
    codes = []
    for arguments, descriptors in cases:
        choose(TEMPLATE, descriptors=descriptors)
        code = generated(arguments, epilogue=lambda found: found * 2)  # goes into the kernel
        assert ("make_tensor_descriptor" in code) == (arguments[0].dtype != torch.float32 and descriptors)
        codes.append((code, tensors_of(arguments)))
    for (found,), (arguments, _) in zip(interpreted_results(codes, tmp_path), cases, strict=True):
        exact = (a.float() if isinstance(a, torch.Tensor) else a for a in arguments)
        wanted = 2 * score_partials_reference(*exact)
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(found.flip(0), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("arch", "number", "descriptors", "modes"),
    [
        (80, 0, False, dict(dtype=torch.bfloat16)),
        (80, 7, False, dict(dtype=torch.float16, bias=True, softcap=30.0)),
        (90, 1, True, dict(dtype=torch.bfloat16)),
        (90, 5, True, dict(dtype=FP8)),
        (100, 0, True, dict(dtype=torch.bfloat16, bias=True)),
        (100, 1, False, dict(dtype=torch.float32)),
    ],
)
def test_compiles_without_a_gpu(choose, monkeypatch, tmp_path, arch, number, descriptors, modes):
    if modes["dtype"] == FP8:
        *rest, row_scale, column_scale = make_fp8_case(256, 4100, 576, dtype=torch.bfloat16)
        arguments = (*rest, 2048, row_scale, column_scale)
    else:
        arguments = arguments_of(make_case(256, 4100, 576, **modes), 2048)
    tiles = head_product.configurations(modes["dtype"])[number]
    choose(TEMPLATE, {**tiles, "PRECISION": "'ieee'"}, descriptors)
    ((name, (text, programs)),) = templates_of(generated(arguments)).items()
    assert programs == 3 * (256 // tiles["BLOCK_M"])
    module = load(text, tmp_path / "generated.py")
    tensors = [*tensors_of(arguments), torch.empty(4, 3, 256)]

    def call():
        getattr(module, name)[(programs,)](*tensors, num_warps=tiles["num_warps"], num_stages=tiles["num_stages"])

    (kernel,) = binaries_for(monkeypatch, tmp_path, arch, [(module, name)], call)
    assert kernel.asm["cubin"].startswith(b"\x7fELF")
    assert kernel.metadata.shared <= (166912 if arch == 80 else 232448)
    assert ("cp.async.bulk.tensor" in kernel.asm["ptx"]) == descriptors
    assert ("mma" in kernel.asm["ptx"]) == (modes["dtype"] != torch.float32)


def test_the_call_is_a_choice(choose):
    choose(OPERATOR)
    arguments = arguments_of(make_case(20, 70, 32, bias=True), 32)
    with config.patch(cpu_backend="cpp"):
        compiled = torch.compile(lambda x, w, b: score_partials(x, w, b, *arguments[3:]))
        found, (code,) = run_and_get_code(compiled, *arguments[:3])
    assert CALL in code
    torch.testing.assert_close(found, score_partials_reference(*arguments))


def test_the_call_is_all_there_is_without_max_autotune(monkeypatch):
    lowerings.register()
    torch._dynamo.reset()
    monkeypatch.setattr(compat, "autotune", None)
    arguments = arguments_of(make_case(20, 70, 32), 32)
    compiled = torch.compile(lambda x, w: score_partials(x, w, *arguments[2:]))
    with config.patch(force_disable_caches=True):
        found, (code,) = run_and_get_code(compiled, *arguments[:2])
    assert CALL in code
    torch.testing.assert_close(found, score_partials_reference(*arguments))


def test_where_the_template_serves(monkeypatch):
    card = SimpleNamespace(capability=(9, 0), shared_memory_per_block_optin=232448, timed=True, triton=True)
    monkeypatch.setattr(compat, "times_templates", lambda device, dtype: card.timed)
    monkeypatch.setattr(compat, "runs_our_kernels", lambda: card.triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card.capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)

    def configs(dtype=torch.bfloat16, rows=300, span=2048, device="cuda"):
        def node(*shape):
            return SimpleNamespace(
                get_size=lambda: shape, get_dtype=lambda: dtype, get_device=lambda: torch.device(device)
            )

        return lowering._configs(node(rows, 64), node(5000, 64), span)

    every = len(head_product.configurations(torch.bfloat16))
    assert len(configs()) == len(configs(FP8)) == every and configs(torch.float32)
    symbol = torch.utils._sympy.symbol.make_symbol(torch.utils._sympy.symbol.SymT.SIZE, 0)
    for refused in (dict(dtype=torch.float64), dict(rows=0), dict(rows=symbol), dict(span=96), dict(device="cpu")):
        assert not configs(**refused), refused
    for name in ("timed", "triton"):
        setattr(card, name, False)
        assert not configs()
        setattr(card, name, True)
    card.capability, card.shared_memory_per_block_optin = (8, 6), 101376
    assert 0 < len(configs()) < every and not configs(FP8)
