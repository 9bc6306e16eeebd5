"""Hangs the optimising passes into AOTAutograd: through Inductor's hook, or through the partitioner."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from cggr_compile import compat
from cggr_compile.options import Options
from cggr_compile.pipeline import run_joint_passes
from cggr_compile.report import GraphDump, GraphReport


def sources() -> list[Path]:
    root = Path(__file__).parent
    # rglob does not follow the link that passes/ is in a checkout
    return sorted({*root.rglob("*.py"), *(root / "passes").rglob("*.py")})


@cache
def source_digest() -> str:
    """Hash of every source file of the package: out-of-tree lowerings and passes are not in Inductor's cache key."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sources():
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def joint_pre_pass(options: Options, report: GraphReport, dump: GraphDump) -> Any:
    """One pass object for Inductor's ``joint_custom_pre_pass``: ours, then whatever the user had set there."""
    others = compat.user_joint_passes()
    # the printed graph, which keys the rest, does not show which of its nodes are recomputed (inline_checkpoints)
    facts = json.dumps([record.details for record in report.passes], sort_keys=True, default=str)

    class JointPrePass(compat.custom_graph_pass()):  # type: ignore[misc]
        def __call__(self, graph: Graph) -> None:
            run_joint_passes(graph, report, dump)
            for other in others:
                other(graph)

        def uuid(self) -> Any:
            keys = [getattr(other, "uuid", lambda: None)() for other in others]
            if any(key is None for key in keys):
                return None  # an unkeyed pass of the user: no caching
            return (source_digest(), options.digest(), facts, *keys)

    return JointPrePass()


def partition_with_passes(report: GraphReport, dump: GraphDump) -> Callable[..., Any]:
    """A partition function that runs the passes over the joint graph first."""

    def partition(joint: GraphModule, inputs: Any, **kwargs: Any) -> Any:
        run_joint_passes(joint.graph, report, dump)
        joint.recompile()
        return compat.default_partition(joint, inputs, **kwargs)

    return partition
