"""FSDP2: which processes share a model's parameters, and the store in which all processes have met."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed


def fsdp_group(module: torch.nn.Module) -> tuple[torch.nn.Module, list[int]] | None:
    """What ``fully_shard`` has sharded, of a module and its parts the first, and the global ranks of its whole mesh."""
    if "torch.distributed.fsdp" not in sys.modules:
        return None
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            group = part._get_fsdp_state()._fsdp_param_group
            if group is not None:
                ranks: list[int] = group.mesh_info.mesh.mesh.flatten().tolist()
                return part, ranks
    return None


def default_store() -> Any:
    """The store of ``torch.distributed``, which is initialised."""
    return torch.distributed.distributed_c10d._get_default_store()
