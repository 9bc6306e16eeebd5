"""Collectives inside of graphs, and how Inductor moves them."""

from __future__ import annotations

import heapq
import sys
from collections import defaultdict
from typing import Any

import torch


def _operator(name: str) -> Any:
    """None in a PyTorch that is built without collectives."""
    return getattr(getattr(torch.ops._c10d_functional, name, None), "default", None)


ALL_GATHER = _operator("all_gather_into_tensor")
ALL_REDUCE = _operator("all_reduce")
REDUCE_SCATTER = _operator("reduce_scatter_tensor")
WAIT = _operator("wait_tensor")


def in_graph_order(nodes: list[Any]) -> list[Any]:
    """Inductor's kernels, each as early as the graph has the first of its operators, or once its inputs are there.

    A kernel may hold operators of many layers, the rows that the backward pass needs of each of them. Inductor puts it
    where the first of them is, and all that it reads, layer upon layer, before what lies between in the graph: gathers
    that were to start ahead, and kernels behind which activations are free.
    """
    made_by = {name: node for node in nodes for name in node.get_buffer_names()}
    waiting: dict[Any, int] = {}
    readers: defaultdict[Any, list[Any]] = defaultdict(list)
    for node in nodes:
        read = {made_by[dep.name] for dep in node.unmet_dependencies if dep.name in made_by} - {node}
        waiting[node] = len(read)
        for one in read:
            readers[one].append(node)
    # of kernels that begin together, the one that Inductor has first
    place = {node: (node.min_order, i) for i, node in enumerate(nodes)}
    ready = [(place[node], node) for node in nodes if not waiting[node]]
    heapq.heapify(ready)
    order = []
    while ready:
        _, node = heapq.heappop(ready)
        order.append(node)
        for reader in readers[node]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, (place[reader], reader))
    return order


# Inductor's settings for graphs with collectives that are in place already. What it does by itself to bound memory
# moves collectives, and elsewhere where tensors have other sizes.
IN_PLACE = {
    "reorder_for_peak_memory": False,
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": [in_graph_order],
}


def is_sharded(tensor: Any) -> bool:
    """Whether it is a ``DTensor``."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(tensor: Any) -> Any:
    """This process's part of a ``DTensor``; anything else as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor
