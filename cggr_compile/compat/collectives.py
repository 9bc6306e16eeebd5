"""Collectives inside of graphs, and how Inductor moves them."""

from __future__ import annotations

import sys
from typing import Any

import torch


def _operator(name: str) -> Any:
    """None in a PyTorch that is built without collectives."""
    return getattr(getattr(torch.ops._c10d_functional, name, None), "default", None)


ALL_GATHER = _operator("all_gather_into_tensor")
ALL_REDUCE = _operator("all_reduce")
REDUCE_SCATTER = _operator("reduce_scatter_tensor")
WAIT = _operator("wait_tensor")

# Inductor's settings for graphs with collectives that are in place already. It would put them in another order where
# tensors have other sizes, and processes whose batches differ in shape would wait for each other's collectives.
IN_PLACE = {"reorder_for_peak_memory": False, "reorder_for_compute_comm_overlap": False}


def is_sharded(tensor: Any) -> bool:
    """Whether it is a ``DTensor``."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(tensor: Any) -> Any:
    """This process's part of a ``DTensor``; anything else as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor
