"""Who runs a compiled graph: the module that was compiled, and the frame that was captured."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch

from cggr_compile.compat.frames import frame_scopes, is_compiled_call
from cggr_compile.compat.modules import original_module

_MODULE_FILE = torch.nn.Module._call_impl.__code__.co_filename
_MODULE_CALLS = ("_call_impl", "_wrapped_call_impl")


@dataclass(frozen=True)
class Caller:
    """Who runs a compiled graph.

    Attributes:
        module: what was given to ``torch.compile``, if that is a module or a method of one; else the outermost module
            that is called under it, which a graph break may have left in pieces; None if there is none.
        captured: the frame that Dynamo captured, running; None at the capture itself.
    """

    module: torch.nn.Module | None
    captured: FrameType | None

    @property
    def scopes(self) -> dict[str, dict[str, Any]]:
        """Locals (L) and globals (G) of the captured frame."""
        if self.captured is None:
            return frame_scopes()
        return {"L": self.captured.f_locals, "G": self.captured.f_globals}


def caller(code: CodeType | None) -> Caller:
    """Who runs the graph that was captured in a frame with this code, read off the stack of Python frames."""
    captured = called = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if is_compiled_call(frame):
            break
        if name in _MODULE_CALLS and file == _MODULE_FILE:
            called = frame
        elif captured is None and code is not None and name == code.co_name and file == code.co_filename:
            captured = frame if frame.f_code.co_firstlineno == code.co_firstlineno else None
        frame = frame.f_back
    if frame is None:  # no torch.compile: the modules further out are anybody's
        return Caller(None, captured)
    module = _module_of(frame.f_locals.get("fn"))
    if module is None and called is not None:
        module = called.f_locals.get("self")
    return Caller(module, captured)


def _module_of(function: Any) -> torch.nn.Module | None:
    """The module that a function is, or is a method of; Dynamo wraps some functions in another."""
    while function is not None:
        owner = function if isinstance(function, torch.nn.Module) else getattr(function, "__self__", None)
        if isinstance(owner, torch.nn.Module):
            return original_module(owner)
        function = getattr(function, "__wrapped__", None)
    return None
