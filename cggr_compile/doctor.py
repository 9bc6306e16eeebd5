"""``doctor``: what is installed, on which device, and which path the backend will take, and why."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

import cggr_compile
from cggr_compile import compat
from cggr_compile.engine import engine_for


def findings() -> list[tuple[str, str]]:
    """(subject, finding) pairs; the last one is the path that will run and the reason."""
    compiler = compat.cpp_compiler()
    cuda = torch.cuda.is_available()
    rows = [
        ("cggr_compile", cggr_compile.__version__),
        ("python", platform.python_version()),
        ("torch", compat.TORCH_VERSION),
        *((name, _version(name)) for name in ("triton", "transformers")),
        ("backend registered", "yes" if _registered() else "no: install the package (pip install .)"),
        ("CUDA device", torch.cuda.get_device_name() if cuda else "none"),
        ("Triton usable", "yes" if cuda and compat.has_triton() else "no"),
        ("C++ compiler", compiler or "none"),
    ]
    path = f"{_path('cuda')} for models on the GPU" if cuda else "no CUDA device"
    return [*rows, ("path", f"{path}; {_path('cpu')} for models on the CPU")]


def _path(device: str) -> str:
    engine, why = engine_for(device)
    return f"{engine} ({why})"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _registered() -> bool:
    return "cggr" in torch.compiler.list_backends()
