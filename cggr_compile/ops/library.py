"""The ``cggr`` operator namespace and the two ways an operator enters it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cggr_compile.compat import runs_our_kernels

LIBRARY = torch.library.Library("cggr", "DEF")


def runs_kernels(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels, which compute in float32 at best, take this tensor of the ``cuda`` device."""
    return tensor.dtype != torch.float64 and runs_our_kernels()


def define_composite(schema: str, implementation: Callable[..., Any]) -> Any:
    """An operator that is one node in the Dynamo graph and dissolves into ATen below it."""
    LIBRARY.define(schema)
    name = schema.split("(", 1)[0]
    LIBRARY.impl(name, implementation, "CompositeImplicitAutograd")
    return getattr(torch.ops.cggr, name).default


def define_opaque(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator that stays one node all the way to the code generator."""
    LIBRARY.define(schema)
    name = schema.split("(", 1)[0]
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cggr::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.cggr, name).default
