"""The hooks that a forward pass hands its saved tensors to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch


def no_saved_tensors_hooks() -> AbstractContextManager[None]:
    """Around what is no part of the user's forward: the saved-tensors hooks in force get none of its tensors."""
    from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing

    return _disable_saved_tensors_hooks_during_tracing()


def under_saved_tensors_hooks() -> bool:
    """Whether a forward hands what it saves to hooks."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def saved_tensors_packers() -> list[Callable[..., Any]]:
    """The pack functions of the saved-tensors hooks in force, the innermost first."""
    autograd: Any = torch._C._autograd
    found = []
    if autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        return []  # none may be set again
    try:
        while (hooks := autograd._top_saved_tensors_default_hooks(True)) is not None:
            autograd._pop_saved_tensors_default_hooks()
            found.append(hooks)
    finally:
        for hooks in reversed(found):
            autograd._push_saved_tensors_default_hooks(*hooks)
    return [pack for pack, _ in found]
