"""Several processes that train one model, each on batches of its own.

Under DistributedDataParallel the backend gets a training step's graph whole, and its pieces if it lets it be. Dynamo
cuts a graph at gradient buckets, so that a bucket is reduced while the backward pass of the pieces before it runs. A
piece of a model cannot be rewritten. So the whole graph is asked for. Where that is not rewritten either, for whatever
cause, it is cut as Dynamo would have: nothing is lost.

Processes under DistributedDataParallel or FSDP2 run their steps together, so what one decides about the time of a step
it decides for all: see :class:`cggr_compile.agreement.Agreement`.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import torch.distributed
from torch.nn import Module

from cggr_compile import compat
from cggr_compile.agreement import Agreement
from cggr_compile.causes import Cause
from cggr_compile.sharding import sharding_of

_SEEDS_APART = 0x1F3D5B79  # odd: no two ranks have the same
Refusal = tuple[Cause, str]
# models that decide together, by what is the same in all processes: two alike are told apart by their order
_agreements: Counter[str] = Counter()


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


def agreement_for(module: Module | None) -> Agreement | None:
    """What the processes decide together by that run the step under capture, ``module``'s; None if there are none."""
    if not _initialized():
        return None
    found = compat.ddp_group() or (None if module is None else _sharded_group(module) or compat.fsdp_group(module))
    if found is None or len(found[1]) < 2:
        return None
    model, ranks = found
    about = f"{ranks} {[(name, tuple(p.shape)) for name, p in model.named_parameters()]}"
    digest = hashlib.sha256(about.encode()).hexdigest()[:16]
    _agreements[digest] += 1
    name = f"{digest}/{_agreements[digest]}"
    return Agreement(compat.default_store(), ranks, torch.distributed.get_rank(), name)


def _sharded_group(module: Module) -> tuple[Module, list[int]] | None:
    sharding = sharding_of(module)
    return None if sharding is None else (module, sharding.ranks)


def _initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def seed_of_rank(seed: int) -> int:
    """A seed in [0, 2**31) of this process's own: ``seed`` itself on rank 0, and without ``torch.distributed``."""
    rank = torch.distributed.get_rank() if _initialized() else 0
    return (seed + rank * _SEEDS_APART) % 2**31
