"""Running and compiling Triton kernels on a machine without a GPU.

Triton decides at import whether its kernels are interpreted, so a child pytest runs test files with
TRITON_INTERPRET=1 and sees the tests marked ``interpreted`` (tests/kernels/test_interpreted.py starts it); everything
else runs in the parent.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def interpreted(test):
    return test if INTERPRETED else None


def compiled(test):
    return None if INTERPRETED else test


def pass_under_the_interpreter(at_least, marks):
    """``at_least``: by test file, how many tests it has to pass; ``marks``: of which tests, as for pytest's ``-m``."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-q", "-rp", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", marks]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, at_least)],
        env=environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    passed = Counter(re.findall(r"^PASSED .*?([^/]+)::", child.stdout, re.M))
    assert all(passed[path.name] >= number for path, number in at_least.items()), passed


def poison_empty_memory(monkeypatch):
    """Memory that nobody wrote is NaN, or a large number."""

    def filled(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(2**30)

        return call

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


def binaries_for(monkeypatch, tmp_path, arch, kernels, call):
    """What ``call`` would launch of ``kernels`` (module, name), compiled for a device that is not there."""
    import triton

    device = SimpleNamespace(
        get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", arch, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    binaries = []

    class WithoutLaunch:
        def __init__(self, kernel):  # a copy: the cache of the real one must not hold these binaries
            self.kernel = triton.jit(kernel.fn, do_not_specialize=kernel.do_not_specialize)

        def __getitem__(self, grid):
            return lambda *args, **options: binaries.append(self.kernel.warmup(*args, grid=grid, **options))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", device)
    for module, name in kernels:
        monkeypatch.setattr(module, name, WithoutLaunch(getattr(module, name)))
    call()
    return binaries
