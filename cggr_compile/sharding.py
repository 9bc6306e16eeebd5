"""How the parameters of a module are spread over processes, for what compiles it; ``distributed.py`` spreads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.nn import Module

RECORD = "_cggr_sharding"  # on the class of every module that has parameters


@dataclass(frozen=True)
class Sharding:
    """How :func:`cggr_compile.distributed.shard` was called.

    Attributes:
        mesh: the ``DeviceMesh``.
        reshard_after_forward: whether the backward pass gathers the parameters anew.
        param_dtype: what parameters are gathered and used in. reduce_dtype: what gradients are reduced in. None: the
            parameter's own.
    """

    mesh: Any
    reshard_after_forward: bool
    param_dtype: torch.dtype | None
    reduce_dtype: torch.dtype | None

    @property
    def ranks(self) -> list[int]:
        """Global ranks of the mesh."""
        found: list[int] = self.mesh.mesh.flatten().tolist()
        return found


def sharding_of(module: Module | None) -> Sharding | None:
    """That of a module or of one of its parts, the first; None if nothing of it is sharded so."""
    for part in () if module is None else module.modules():
        found: Sharding | None = getattr(type(part), RECORD, None)
        if found is not None:
            return found
    return None
