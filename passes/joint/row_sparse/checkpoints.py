"""Which values are computed again, or not yet: there, rows may be all that is needed of a whole tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from cggr_compile.passes.joint.row_sparse.rule import rule_of

if TYPE_CHECKING:
    from torch.fx import Node

    from cggr_compile.passes.joint.row_sparse.annotations import Annotations

RECOMPUTE = ("recompute", "ac_graph_id")


def recomputed(node: Node) -> bool:
    """Whether an activation checkpoint computes this again in the backward pass."""
    return "recompute" in node.meta and not kept_by_checkpoint(node)


def kept_by_checkpoint(node: Node) -> bool:
    """Whether this is computed inside a checkpoint and kept for the next one: it is the result of the first."""
    region = node.meta.get("ac_graph_id")
    return region is not None and any(user.meta.get("ac_graph_id", region) != region for user in node.users)


def only_rows_wanted(at: Annotations, node: Node) -> bool:
    """Whether a whole product is wanted for nothing but its rows."""
    if node in at.backward:
        return ends_at_markers(node, lambda target: rule_of(target).mixes == "nothing")
    return recomputed(node) and not _mixes_positions(node)


def ends_at_markers(node: Node, through: Callable[[Any], bool]) -> bool:
    """Whether selected rows are all that is wanted of a gradient: it goes to markers only, ``through`` calls."""
    return all(
        user.target is torch.ops.cggr.detach_unselected_backward.default
        or (through(user.target) and ends_at_markers(user, through))
        for user in node.users
    )


def _mixes_positions(node: Node) -> bool:
    """Whether its checkpoint makes something else of ``node`` than a function of each position: attention, mostly."""
    region, seen, waiting = node.meta["ac_graph_id"], {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            if user in seen or user.meta.get("ac_graph_id") != region:
                continue
            if rule_of(user.target).mixes == "positions":
                return True
            seen.add(user)
            waiting.append(user)
    return False
