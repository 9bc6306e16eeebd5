"""Calls of a Dynamo graph that change what its later nodes run in: grad mode, autocast, inference mode, vmap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.fx import Node

# what a Dynamo graph calls to change the state that its later nodes run in
SET_GRAD = torch._C._set_grad_enabled
ENTER_AUTOCAST, EXIT_AUTOCAST = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
ENTER_INFERENCE = torch.autograd.grad_mode._enter_inference_mode
EXIT_INFERENCE = torch.autograd.grad_mode._exit_inference_mode


@contextmanager
def modes_kept() -> Iterator[None]:
    """Around nodes of a graph that are run: what they change and do not undo, as after an exception, is undone.

    Grad mode, autocast, and levels of ``torch.vmap``; not inference mode, which ends with the object that began it.
    """
    from torch._C._functorch import _vmap_decrement_nesting, get_dynamic_layer_stack_depth

    depth = get_dynamic_layer_stack_depth()
    with ExitStack() as state:
        state.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        for kind in ("cpu", "cuda"):
            enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            state.enter_context(torch.autocast(kind, dtype, enabled=enabled))
        try:
            yield
        finally:
            while get_dynamic_layer_stack_depth() > depth:
                _vmap_decrement_nesting()


def enters_or_leaves_vmap(node: Node) -> bool:
    """Whether a call opens or closes a level of ``torch.vmap``, on which the calls in between rely without using it."""
    target: Any = node.target
    return node.op == "call_function" and getattr(target, "__module__", "") == "torch._functorch.predispatch"
