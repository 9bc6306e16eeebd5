"""Activation checkpoints, in a graph and around a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

# metadata of a checkpoint's body: the context_fn of selective activation checkpointing
CHECKPOINT_CONTEXT = "_checkpoint_context_fn"


def next_checkpoint_id() -> int:
    """An ``ac_graph_id``: they grow in the order of the graph, and no two checkpoints of a process share one."""
    from torch._higher_order_ops.wrap import uid

    return next(uid)


def checkpoint_of(pack: Callable[..., Any]) -> tuple[Any, bool] | None:
    """The call of ``torch.utils.checkpoint`` that a pack function belongs to, and whether it recomputes.

    An object that lives as long as what the checkpoint has to recompute; None for other hooks.
    """
    pack = getattr(pack, "_torchdynamo_orig_callable", pack)  # torch 2.13 disables Dynamo in the recomputation's
    code = getattr(pack, "__code__", None)
    if code is None or code.co_filename != _checkpoint_file():
        return None
    cells = dict(zip(code.co_freevars, (cell.cell_contents for cell in pack.__closure__ or ()), strict=True))
    if "frame" in cells:
        return cells["frame"], False
    frame = cells["target_frame_ref"]() if "target_frame_ref" in cells else None
    return None if frame is None else (frame, True)


@functools.cache
def _checkpoint_file() -> str:
    from torch.utils.checkpoint import _checkpoint_hook

    return _checkpoint_hook.__init__.__code__.co_filename
