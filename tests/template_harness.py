"""What Inductor generates of Triton templates, on a machine without a GPU: rendered, interpreted, compiled.

On the CPU Inductor has no use for such kernels, but it writes them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import triton
from torch._inductor import select_algorithm
from torch._inductor.graph import GraphLowering

from cggr_compile import lowerings

DEVICE = SimpleNamespace(
    get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32), get_current_device=lambda: 0
)


def pretend_to_time(monkeypatch):
    """Inductor as on a GPU, but that choices are named instead of timed: by the function returned, as a pattern."""
    lowerings.register()
    torch._dynamo.reset()
    monkeypatch.setattr(triton.runtime.driver, "_active", DEVICE)
    monkeypatch.setattr(select_algorithm.AlgorithmSelectorCache, "make_precompile_fn", lambda *_, **__: dict)

    def choose(pattern, always=()):
        """``always``: choices that there have to be at any rate."""

        def tune(self, name, nodes, layout, generators, key, choices, *_, **__):
            assert set(always) <= {c.name for c in choices}
            assert any(re.search(pattern, c.name) for c in choices), [c.name for c in choices]
            return {c: float(not re.search(pattern, c.name)) for c in choices}

        monkeypatch.setattr(select_algorithm.AlgorithmSelectorCache, "do_autotuning", tune)

    return choose


class Generated(Exception):
    pass


def code_of(function, *tensors):
    """What Inductor writes for a function; it is neither compiled nor run."""
    codes = []

    def keep(self):
        codes.append(self.codegen()[0].value)
        return SimpleNamespace(call=stop)

    def stop(*_):
        raise Generated

    torch._dynamo.reset()
    with patch.object(GraphLowering, "compile_to_module", keep), pytest.raises(Generated):
        torch.compile(function)(*tensors)
    (code,) = codes
    return code


def templates_of(code):
    """Text of the kernels made of templates, by their names, and how many programs each is launched with."""
    found = {}
    for name, text in re.findall(r"async_compile\.triton\('(triton_tem\w*)', '''(.*?)'''", code, re.S):
        (programs,) = re.findall(rf"{name}\.run\(.*?, (\d+), 1, 1, stream", code)
        found[name] = re.sub(r"@triton_heuristics\.template\(.*?\n\)\n", "", text, flags=re.S), int(programs)
    return found


def load(text, path):
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


INTERPRET = """
import pathlib, re, sys, torch
sys.path.insert(0, sys.argv[1])
from template_harness import load
from torch._inductor.async_compile import AsyncCompile

class Kernel:
    def __init__(self, function):
        self.function = function
    def run(self, *arguments, stream):
        *given, x, y, z = arguments
        self.function[(x, y, z)](*given)

def poisoned(*arguments):
    made = torch.empty_strided(*arguments[:2], dtype=arguments[2])
    return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(2**30)

for path in map(pathlib.Path, sys.argv[2:]):
    def triton(self, name, text, device_str="cuda"):
        text = re.sub(r"@triton_heuristics\\.template\\(.*?\\n\\)\\n", "", text, flags=re.S)
        return Kernel(getattr(load(text, path.with_name(f"{path.stem}_{name}.py")), name))
    AsyncCompile.triton, AsyncCompile.wait = triton, lambda self, scope: None
    import cggr_compile.ops
    module = load(path.read_text(), path)
    module.empty_strided_cpu = poisoned
    results = module.call(list(torch.load(path.with_suffix(".in"))))
    torch.save([r.contiguous() for r in results], path.with_suffix(".out"))
"""


def interpreted_results(cases, folder):
    """Results of generated code, kernels interpreted and memory poisoned. ``cases``: (code, tensors)."""
    paths = [folder / f"case_{number}.py" for number in range(len(cases))]
    for path, (code, tensors) in zip(paths, cases, strict=True):
        path.write_text(code)
        torch.save(tensors, path.with_suffix(".in"))
    child = subprocess.run(
        [sys.executable, "-c", INTERPRET, os.path.dirname(__file__), *map(str, paths)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return [torch.load(path.with_suffix(".out")) for path in paths]
