"""The template of ``score_partials`` as Inductor renders it: interpreted for its numbers, compiled for fit.

On the CPU Inductor has no use for the kernel, but it writes it (``get_code`` does not run what it returns).
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from ops.test_score import make_case, make_fp8_case  # noqa: E402
from torch._inductor import config, select_algorithm  # noqa: E402
from torch._inductor.utils import get_code, run_and_get_code  # noqa: E402
from triton_harness import binaries_for  # noqa: E402

from cggr_compile import compat, lowerings  # noqa: E402
from cggr_compile.kernels import score as kernels  # noqa: E402
from cggr_compile.lowerings import score as lowering  # noqa: E402
from cggr_compile.ops.score import FP8, score_partials, score_partials_reference  # noqa: E402

pytestmark = pytest.mark.skipif(compat.cpp_compiler() is None, reason="needs a C++ compiler")

SMALL = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, GROUP=2, num_warps=4, num_stages=1, PRECISION="'ieee'")
TEMPLATE, OPERATOR = "^triton_cggr_score", "^cggr_score"  # names of choices
CALL = "= torch.ops.cggr.score_partials"
DEVICE = SimpleNamespace(
    get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32), get_current_device=lambda: 0
)


@pytest.fixture
def choose(monkeypatch):
    """Inductor as on a GPU, but that the choice is named instead of timed."""
    lowerings.register()
    torch._dynamo.reset()
    monkeypatch.setattr(triton.runtime.driver, "_active", DEVICE)
    monkeypatch.setattr(select_algorithm.AlgorithmSelectorCache, "make_precompile_fn", lambda *_, **__: dict)

    def choose(pattern, way=None, descriptors=False):
        def tune(self, name, nodes, layout, generators, key, choices, *_, **__):
            assert any(c.name == "cggr_score_partials" for c in choices)  # the way out if no template works
            return {c: float(not re.search(pattern, c.name)) for c in choices}

        ways = [way or SMALL, {**(way or SMALL), "GROUP": 1}]
        monkeypatch.setattr(select_algorithm.AlgorithmSelectorCache, "do_autotuning", tune)
        monkeypatch.setattr(lowering, "_ways", lambda *_: ways)
        monkeypatch.setattr(kernels, "tma_loads", lambda device, strides, width, address: descriptors)

    with config.patch(force_disable_caches=True, cpu_backend="triton"):
        yield choose


def arguments_of(case, span, scales=()):
    return (*case[:3], *case[4:], span, *scales)


def generated(arguments, epilogue=lambda found: found):
    """Text of the kernel, its name, and how many programs it is launched with."""
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]

    def function(*given):
        left = iter(given)
        return epilogue(score_partials(*(next(left) if isinstance(a, torch.Tensor) else a for a in arguments)))

    code, *_ = get_code(torch.compile(function), *tensors)
    assert CALL not in code
    (text,) = re.findall(r"async_compile\.triton\('triton_tem\w*', '''(.*?)'''", code, re.S)
    text = re.sub(r"@triton_heuristics\.template\(.*?\n\)\n", "", text, flags=re.S)
    (name,) = re.findall(r"def (triton_tem\w*)\(", text)
    (programs,) = re.findall(rf"{name}\.run\(.*?, (\d+), 1, 1, stream", code)
    return text, name, int(programs)


RUN = """
import importlib.util, sys, torch
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("generated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    name, programs, tensors = torch.load(path + ".pt")
    getattr(module, name)[(programs,)](*tensors)
    torch.save(tensors[-1], path + ".pt")
"""


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
    paths = []
    for number, (arguments, descriptors) in enumerate(cases):
        choose(TEMPLATE, descriptors=descriptors)
        text, name, programs = generated(arguments, epilogue=lambda found: found * 2)  # goes into the kernel
        assert ("make_tensor_descriptor" in text) == (arguments[0].dtype != torch.float32 and descriptors)
        out = torch.full_like(score_partials_reference(*arguments), torch.nan)
        paths.append(str(tmp_path / f"case_{number}.py"))
        with open(paths[-1], "w") as file:
            file.write(text)
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        torch.save((name, programs, [*tensors, out]), paths[-1] + ".pt")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", RUN, *paths], env=environment, capture_output=True, text=True, timeout=200
    )
    assert child.returncode == 0, child.stderr[-4000:]
    for path, (arguments, _) in zip(paths, cases, strict=True):
        exact = (a.float() if isinstance(a, torch.Tensor) else a for a in arguments)
        found, wanted = torch.load(path + ".pt"), 2 * score_partials_reference(*exact)
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
    way = kernels.configurations(modes["dtype"])[number]
    choose(TEMPLATE, {**way, "PRECISION": "'ieee'"}, descriptors)
    text, name, programs = generated(arguments)
    assert programs == 3 * (256 // way["BLOCK_M"])
    path = tmp_path / "generated.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("generated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    tensors.append(torch.empty(4, 3, 256))

    def call():
        getattr(module, name)[(programs,)](*tensors, num_warps=way["num_warps"], num_stages=way["num_stages"])

    (kernel,) = binaries_for(monkeypatch, tmp_path, arch, module, [name], call)
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
    monkeypatch.setattr(compat, "fastest", None)
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

    def ways(dtype=torch.bfloat16, rows=300, span=2048, device="cuda"):
        def node(*shape):
            return SimpleNamespace(
                get_size=lambda: shape, get_dtype=lambda: dtype, get_device=lambda: torch.device(device)
            )

        return lowering._ways(node(rows, 64), node(5000, 64), span)

    every = len(kernels.configurations(torch.bfloat16))
    assert len(ways()) == len(ways(FP8)) == every and ways(torch.float32)
    symbol = torch.utils._sympy.symbol.make_symbol(torch.utils._sympy.symbol.SymT.SIZE, 0)
    for refused in (dict(dtype=torch.float64), dict(rows=0), dict(rows=symbol), dict(span=96), dict(device="cpu")):
        assert not ways(**refused), refused
    for name in ("timed", "triton"):
        setattr(card, name, False)
        assert not ways()
        setattr(card, name, True)
    card.capability, card.shared_memory_per_block_optin = (8, 6), 101376
    assert 0 < len(ways()) < every and not ways(FP8)
