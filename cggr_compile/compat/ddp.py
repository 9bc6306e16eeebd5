"""DistributedDataParallel inside of Dynamo: its optimizer cuts every graph at gradient buckets, and a backend gets the
pieces. (``torch._dynamo.backends.distributed.DDPOptimizer``) And which processes take part in it."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, NoReturn

import torch.distributed

_MARK = "_cggr_before"  # on an optimizer, which lives as long as the compilation of one frame


class DDPCut:
    """How DDPOptimizer cuts the graph under capture; changed, Dynamo captures the frame anew.

    Attributes:
        piece: whether the backend has got a part of the graph.
        asked: whether it has asked for the whole of it.
        declined: what it has said against the whole; None before.
    """

    def __init__(self, optimizer: Any, piece: bool) -> None:
        self._optimizer, self.piece = optimizer, piece
        self._before: tuple[int, int, Any] | None = getattr(optimizer, _MARK, None)
        self.asked = self._before is not None
        self.declined = self._before[2] if self._before is not None else None

    def ask_for_the_whole(self) -> NoReturn:
        """Nothing is cut any more, in this compilation."""
        optimizer = self._optimizer
        setattr(optimizer, _MARK, (optimizer.bucket_bytes_cap, optimizer.first_bucket_cap, None))
        optimizer.bucket_bytes_cap = optimizer.first_bucket_cap = sys.maxsize
        _restart("the backend asks for the whole graph")

    def decline(self, why: Any) -> NoReturn:
        """Cut as before; ``why`` is remembered (``declined``)."""
        assert self._before is not None
        optimizer = self._optimizer
        optimizer.bucket_bytes_cap, optimizer.first_bucket_cap, _ = self._before
        setattr(optimizer, _MARK, (*self._before[:2], why))
        _restart("the backend does not rewrite the whole graph")


def ddp_cut() -> DDPCut | None:
    """For a backend that Dynamo calls: how DDPOptimizer cuts what is captured; None if it does not take part."""
    piece = False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith("distributed.py"):
            piece = piece or frame.f_code.co_name == "compile_submod"
            optimizer = frame.f_locals.get("self")
            if frame.f_code.co_name == "compile_fn" and hasattr(optimizer, "first_bucket_cap"):
                return DDPCut(optimizer, piece)
        frame = frame.f_back
    return None


def ddp_group() -> tuple[torch.nn.Module, list[int]] | None:
    """What the DistributedDataParallel whose forward runs is wrapped around, and its global ranks; None without one.

    None also under ``Join``, where some processes end before the others.
    """
    from torch.nn.parallel import DistributedDataParallel

    running = DistributedDataParallel._active_ddp_module
    if running is None or running._join_config.enable:
        return None
    return running.module, torch.distributed.get_process_group_ranks(running.process_group)


def _restart(why: str) -> NoReturn:
    # of the exceptions that restart a capture, the one that Dynamo lets a backend raise
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis

    raise TensorifyScalarRestartAnalysis(restart_reason=why)
