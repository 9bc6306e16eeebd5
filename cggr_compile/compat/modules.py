"""Modules: what ``torch.compile`` makes of them, and copies that share their state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

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


def compiled_call(module: torch.nn.Module) -> Callable[..., Any] | None:
    """What runs in place of a module's call, since ``Module.compile`` or :func:`set_compiled_call`; None if nothing."""
    return module._compiled_call_impl


def set_compiled_call(module: torch.nn.Module, call: Callable[..., Any] | None) -> None:
    """Let ``call`` run in place of a module's call, as ``Module.compile`` does it; None takes it away."""
    module._compiled_call_impl = call


def plain_call(module: torch.nn.Module) -> Callable[..., Any]:
    """A module's call, hooks included, as it is where nothing is compiled."""
    return module._call_impl


def forward_hooks(module: torch.nn.Module) -> dict[int, Callable[..., Any]]:
    """A module's own forward hooks, each under its number."""
    return dict(module._forward_hooks)


def remove_forward_hook(module: torch.nn.Module, number: int) -> None:
    """Take one of :func:`forward_hooks` off, as its handle would."""
    for hooks in (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called):
        hooks.pop(number, None)


def with_child(module: torch.nn.Module, name: str, child: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module with another child, not compiled; parameters, buffers and hooks stay the original's."""
    copied = copy.copy(module)
    vars(copied)["_modules"] = {**module._modules, name: child}
    vars(copied).pop("_compiled_call_impl", None)
    return copied


def own_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """What a module itself stores as parameters, by name: past properties of its class."""
    stored: dict[str, torch.nn.Parameter | None] = module._parameters
    return stored


def own_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """The same of its buffers."""
    stored: dict[str, torch.Tensor | None] = module._buffers
    return stored
