"""What Dynamo is compiling, read off its own state and the stack of Python frames."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any


def captured_code() -> CodeType | None:
    """The code that Dynamo is compiling; None outside a capture. What it makes of that has the same name and place."""
    tx = translator()
    return None if tx is None else tx.f_code


def frame_scopes() -> dict[str, dict[str, Any]]:
    """Locals (L) and globals (G) of the frame that Dynamo is compiling; empty outside a capture."""
    tx = translator()
    return {} if tx is None else {"L": tx.f_locals, "G": tx.f_globals}


def recompilations_left() -> int | None:
    """How many more graphs Dynamo compiles for the frame it is capturing, this one included; None outside."""
    from torch._dynamo import config
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    code = captured_code()
    return None if code is None else int(config.recompile_limit) - len(_debug_get_cache_entry_list(code))


@dataclass(frozen=True)
class Compilation:
    """An attempt of Dynamo's to compile a frame.

    Attributes:
        code, scope: the frame's, and its locals.
        backend: the function that will compile it, without what Dynamo and torch.compile have put around it.
        limit, value: the setting of ``torch._dynamo.config`` that forbids it, and its value; None if none does.
    """

    code: CodeType
    scope: dict[str, Any]
    backend: Any
    limit: str | None
    value: int | None


def before_every_compilation(hook: Callable[[], str]) -> None:
    """Let Dynamo call ``hook`` before it compiles a frame, or decides that it has done so too often.

    What the hook raises reaches the user's call. It returns a text for Dynamo's records.
    """
    from torch._dynamo.utils import get_hook_for_recompile_user_context, register_hook_for_recompile_user_context

    if hook not in (get_hook_for_recompile_user_context() or ()):
        register_hook_for_recompile_user_context(hook)


def compilation() -> Compilation | None:
    """In a hook of :func:`before_every_compilation`: what Dynamo is about to compile."""
    from torch._dynamo import config
    from torch._dynamo.cache_size import exceeds_recompile_limit

    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_frame_of(frame, "convert_frame.py", "_compile"):
        frame = frame.f_back
    if frame is None:
        return None
    known = frame.f_locals
    exceeded, limit = exceeds_recompile_limit(known["cache_size"], known["compile_id"])
    value = int(getattr(config, limit)) if exceeded else None
    backend = _innermost(known["compiler_fn"])
    return Compilation(known["code"], known["locals"], backend, limit if exceeded else None, value)


def _innermost(backend: Any) -> Any:
    """Dynamo's own wrapper, torch.compile's, which has the options, and DDPOptimizer taken off."""
    while True:
        names = ("_torchdynamo_orig_backend", "compiler_fn", "backend_compile_fn")
        inner = next((found for name in names if (found := getattr(backend, name, None)) is not None), None)
        if inner is None:
            return backend
        backend = inner


def is_compiled_call(frame: FrameType) -> bool:
    """Whether a frame is the call of something that ``torch.compile`` returned (or ``Module.compile`` made)."""
    return _is_frame_of(frame, "eval_frame.py", "compile_wrapper")


def below_dynamo(frame: FrameType | None) -> FrameType | None:
    """The frame that called the one under capture, seen from a backend; None outside a capture."""
    found = None
    while frame is not None and not is_compiled_call(frame):
        if _is_frame_of(frame, "convert_frame.py", "__call__"):
            found = frame
        elif found is not None:
            break
        frame = frame.f_back
    return None if found is None else found.f_back


def translator() -> Any:
    """Dynamo's translator of the frame that it is compiling; None outside a capture."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx()
    except AttributeError:  # the thread-local is unset outside a capture (2.13; 2.11 returns None)
        return None


def _is_frame_of(frame: FrameType, file: str, *functions: str) -> bool:
    """Whether a frame runs one of these functions of a file of Dynamo's."""
    code = frame.f_code
    return code.co_name in functions and Path(code.co_filename).parts[-3:] == ("torch", "_dynamo", file)
