"""Notices that Dynamo gives up on code that the backend has compiled: from then on it may run without the backend."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from cggr_compile import compat
from cggr_compile.causes import Cause

# what to call with the model that was about to run (None: unknown), and the reason
Tell = Callable[[torch.nn.Module | None, str], None]
_watched: weakref.WeakKeyDictionary[CodeType, Tell] = weakref.WeakKeyDictionary()
_given_up: dict[str, str] = {}


def watch(tell: Tell) -> None:
    """The code under capture is a model's, and must not be given up silently: ``tell`` is then called with the reason.

    Past its limits Dynamo calls no backend any more. So it is asked to call a hook before it compiles anything; what
    ``tell`` raises reaches the user's call.
    """
    code = compat.captured_code()
    if code is not None:
        _watched[code] = tell
        compat.before_every_compilation(_before_compiling)


def reset() -> None:
    """``torch._dynamo.reset()``: Dynamo compiles everything anew."""
    _watched.clear()
    _given_up.clear()


def given_up() -> str:
    """What was given up since the last reset, as a sentence; empty if nothing was."""
    return "; ".join(_given_up.values())


def _before_compiling() -> str:
    found = compat.compilation()
    if found is None or found.limit is None or found.code not in _watched:
        return ""
    function = f"{found.code.co_name!r} ({Path(found.code.co_filename).name}:{found.code.co_firstlineno})"
    reason = Cause.RECOMPILE_LIMIT.says(function=function, limit=found.limit, value=found.value)
    _given_up[function] = reason
    _watched[found.code](_model_in(found.scope), reason)
    return ""


def _model_in(scope: dict[str, Any]) -> torch.nn.Module | None:
    """The model that is about to run: the code may have been compiled for another of its class."""
    arguments = scope.get("args", ())
    values = (scope.get("self"), *(arguments if isinstance(arguments, tuple) else ()), *scope.values())
    return next((value for value in values if isinstance(value, torch.nn.Module)), None)
