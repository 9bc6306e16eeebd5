"""Which compiler lowers a graph."""

from __future__ import annotations

import torch

from cggr_compile import compat
from cggr_compile.engine import device_of, engine_for


def test_engine_on_a_cpu(monkeypatch):
    monkeypatch.setattr(compat, "cpp_compiler", lambda: "g++")
    assert engine_for("cpu")[0] == "Inductor CPU"
    assert engine_for("cpu", "eager") == ("eager", "compiler='eager'")
    monkeypatch.setattr(compat, "cpp_compiler", lambda: None)
    assert engine_for("cpu") == ("eager", "no C++ compiler for Inductor")
    assert engine_for("cpu", "inductor")[0] == "Inductor CPU"


def test_engine_on_accelerators(monkeypatch):
    monkeypatch.setattr(compat, "has_triton", lambda: True)
    assert engine_for("cuda")[0] == "Inductor CUDA"
    assert engine_for("mps") == ("eager", "no code is generated for mps")
    monkeypatch.setattr(compat, "has_triton", lambda: False)
    assert engine_for("cuda") == ("eager", "Triton is not usable")


def test_the_device_is_that_of_the_first_tensor():
    assert device_of([3, torch.ones(1, device="meta"), torch.ones(1)]) == "meta"
    assert device_of([]) == "cpu"
