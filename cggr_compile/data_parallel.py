"""Several processes that train one model, each on batches of its own.

Under DistributedDataParallel the backend gets a training step's graph whole, and its pieces if it lets it be. Dynamo
cuts a graph at gradient buckets, so that a bucket is reduced while the backward pass of the pieces before it runs. A
piece of a model cannot be rewritten. So the whole graph is asked for. Where that is not rewritten either, for whatever
cause, it is cut as Dynamo would have: nothing is lost.
"""

from __future__ import annotations

import torch.distributed

from cggr_compile import compat
from cggr_compile.causes import Cause

_SEEDS_APART = 0x1F3D5B79  # odd: no two ranks have the same
Refusal = tuple[Cause, str]


def ask_for_the_whole_graph() -> Refusal | None:
    """To be called with a training step's graph. If it is a piece, Dynamo captures the whole, once.

    Returns:
        why the whole was not rewritten, if this is a piece of it.
    """
    cut = compat.ddp_cut()
    if cut is None or not cut.piece:
        return None
    if cut.declined is None:
        cut.ask_for_the_whole()
    declined: Refusal = cut.declined
    return declined


def hand_back(cause: Cause | None, reason: str) -> None:
    """The graph is not rewritten: if it is whole because it was asked for, Dynamo cuts it now."""
    cut = compat.ddp_cut()
    if cut is not None and cut.asked and not cut.piece:
        cut.decline((cause, reason))


def seed_of_rank(seed: int) -> int:
    """A seed in [0, 2**31) of this process's own: ``seed`` itself on rank 0, and without ``torch.distributed``."""
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if known else 0
    return (seed + rank * _SEEDS_APART) % 2**31
