"""Modules: what ``torch.compile`` makes of them, and copies that share their state."""

from __future__ import annotations

import copy

import torch


def original_module(module: torch.nn.Module) -> torch.nn.Module:
    """What ``torch.compile(module)`` was given, or the module itself."""
    from torch._dynamo.eval_frame import OptimizedModule

    while isinstance(module, OptimizedModule):
        module = module._orig_mod
    return module


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether ``module`` is what ``torch.compile`` returned, or its method ``compile`` was called."""
    return original_module(module) is not module or module._compiled_call_impl is not None


def with_child(module: torch.nn.Module, name: str, child: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module with another child, not compiled; parameters, buffers and hooks stay the original's."""
    copied = copy.copy(module)
    vars(copied)["_modules"] = {**module._modules, name: child}
    vars(copied).pop("_compiled_call_impl", None)
    return copied
