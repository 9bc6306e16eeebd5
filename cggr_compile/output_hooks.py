"""Installs the hooks by which transformers collects router logits, hidden states and attentions, before a capture.

transformers installs them at the first call that asks for such outputs, under a lock, which ends Dynamo's graph. Behind
that break there is no going back to the compiled call, so they are installed before Dynamo compiles it.
"""

from __future__ import annotations

import sys
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.nn import Module

from cggr_compile import compat

CAPTURING = "transformers.utils.output_capturing"
_watched: list[Callable[..., Any]] = []


def watch(backend: Callable[..., Any]) -> None:
    """Let every compilation by this backend begin with the hooks that the call about to run asks for."""
    _watched.append(backend)
    compat.before_every_compilation(_before_compiling)


def install(scope: Mapping[str, Any], named: frozenset[str] = frozenset()) -> list[Module]:
    """Install the hooks in the transformers models that a frame can reach and that are asked for such outputs.

    A model is asked by its ``config``, by an argument ``output_...`` (of its own or in a dict), or by the frame's code.
    Models with some hooks already are left alone: transformers would install those a second time.

    Args:
        scope: the frame's locals. named: the strings in its code.

    Returns:
        The models.
    """
    capturing = sys.modules.get(CAPTURING)
    if capturing is None:  # no transformers, or a release without such hooks
        return []
    values = [*scope.values()]
    values += [inner for value in values if isinstance(value, tuple) for inner in value]
    asked = set(filter(_is_output, named))
    for names in (scope, *(value for value in values if isinstance(value, (dict, UserDict)))):
        asked |= {
            name for name, value in names.items() if _is_output(name) and value is not None and value is not False
        }
    # a module whose constructor is the frame has no children yet, not even none
    roots = (value for value in values if isinstance(value, Module) and "_modules" in vars(value))
    models = dict.fromkeys(model for root in roots for model in _outermost(root))
    found = [model for model in models if _records(model, asked) and not any(map(_has_hooks, model.modules()))]
    for model in found:
        capturing.maybe_install_capturing_hooks(model)
    return found


def _before_compiling() -> str:
    found = compat.compilation()
    if found is not None and any(found.backend is backend for backend in _watched):
        theirs = "transformers" in Path(found.code.co_filename).parts  # which names every output that can be asked for
        install(found.scope, frozenset() if theirs else frozenset(_strings(found.code.co_consts)))
    return ""


def _strings(constants: tuple[Any, ...]) -> Iterator[str]:
    """Names of keyword arguments are strings among the constants, or tuples of them."""
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from _strings(constant)


def _is_output(name: Any) -> bool:
    return isinstance(name, str) and name.startswith("output_")


def _outermost(module: Module) -> Iterator[Module]:
    """The transformers models in a module that lie in no other one."""
    if hasattr(type(module), "_can_record_outputs"):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


def _records(model: Module, asked: set[str]) -> bool:
    """Whether some part of the model records what it is asked for."""
    for part in model.modules():
        for name in getattr(type(part), "_can_record_outputs", None) or ():
            flag = f"output_{name}"
            if flag in asked or getattr(getattr(part, "config", None), flag, False):
                return True
    return False


def _has_hooks(module: Module) -> bool:
    return getattr(module, "_output_capturing_hooks_installed", False) is True
