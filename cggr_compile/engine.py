"""Which compiler lowers a graph, and why that one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor

from cggr_compile import compat

Engine = Literal["Inductor CUDA", "Inductor CPU", "eager"]


def engine_for(device: str, wanted: str = "auto") -> tuple[Engine, str]:
    """The compiler for graphs on a kind of device ("cuda", "cpu", ...), and the reason.

    Args:
        wanted: the option ``compiler``.
    """
    if wanted == "eager":
        return "eager", "compiler='eager'"
    if device == "cuda":
        if compat.has_triton() or wanted == "inductor":
            return "Inductor CUDA", "Triton is usable" if compat.has_triton() else "compiler='inductor'"
        return "eager", "Triton is not usable"
    found = compat.cpp_compiler() if device == "cpu" else None
    if found is not None or wanted == "inductor":
        return "Inductor CPU", "C++ compiler found" if found is not None else "compiler='inductor'"
    return "eager", "no C++ compiler for Inductor" if device == "cpu" else f"no code is generated for {device}"


def device_of(inputs: Iterable[Any]) -> str:
    """The kind of device that a graph runs on: its first tensor's."""
    return next((t.device.type for t in inputs if isinstance(t, Tensor)), "cpu")
