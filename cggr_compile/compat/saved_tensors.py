"""The hooks that a forward pass hands its saved tensors to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


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


def kept_for_backward(root: Tensor) -> list[Tensor]:
    """The tensors that the compiled graphs behind ``root`` have saved for their backward pass."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    todo = [root.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [other for other, _ in node.next_functions]
        # AOTAutograd keeps some of them beside those that autograd guards against writes
        found += [*getattr(node, "saved_tensors", ()), *(getattr(node, "_tensors_no_vc_check", None) or ())]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]
