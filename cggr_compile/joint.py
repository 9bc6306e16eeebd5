"""Hangs the optimising passes into AOTAutograd: through Inductor's hook, or through the partitioner."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from torch.fx import Graph, GraphModule

from cggr_compile import compat
from cggr_compile.options import Options
from cggr_compile.pipeline import calls_our_operators, run_joint_passes
from cggr_compile.report import GraphDump, GraphReport


def sources() -> list[Path]:
    root = Path(__file__).parent
    # rglob does not follow the link that passes/ is in a checkout
    return sorted({*root.rglob("*.py"), *(root / "passes").rglob("*.py")})


@cache
def source_digest() -> str:
    """Hash of every source file of the package: out-of-tree lowerings and passes are not in Inductor's cache key."""
    return compat.hash_of_files(sources())


def joint_pre_pass(options: Options, report: GraphReport, dump: GraphDump) -> Any:
    """One pass object for Inductor's ``joint_custom_pre_pass``: ours, then whatever the user had set there."""
    return _pre_pass(lambda graph: run_joint_passes(graph, options, report, dump), passes_key(options, report))


def passes_key(options: Options, report: GraphReport) -> tuple[str, str]:
    """Whatever the joint passes depend on, but for the sources and the printed graph; before they run."""
    # the printed graph does not show which of its nodes are recomputed (inline_checkpoints)
    facts = json.dumps([record.details for record in report.passes], sort_keys=True, default=str)
    return options.digest(), facts


def source_key() -> Any:
    """A ``joint_custom_pre_pass`` that changes nothing: it puts our sources into the key of Inductor's cache."""
    return _pre_pass(lambda graph: None, ())


def _pre_pass(ours: Callable[[Graph], None], key: tuple[str, ...]) -> Any:
    others = compat.user_joint_passes()

    class JointPrePass(compat.custom_graph_pass()):  # type: ignore[misc]
        def __call__(self, graph: Graph) -> None:
            ours(graph)
            for other in others:
                other(graph)

        def uuid(self) -> Any:
            keys = [getattr(other, "uuid", lambda: None)() for other in others]
            if any(key is None for key in keys):
                return None  # an unkeyed pass of the user: no caching
            return (source_digest(), *key, *keys)

    return JointPrePass()


def holds_our_operators(gm: GraphModule) -> bool:
    """Whether a graph, or one inside it (the body of a checkpoint), calls a ``cggr::`` operator."""
    return any(calls_our_operators(module.graph) for module in gm.modules() if isinstance(module, GraphModule))


def partition_with_passes(options: Options, report: GraphReport, dump: GraphDump) -> Callable[..., Any]:
    """A partition function that runs the passes over the joint graph first."""

    def partition(joint: GraphModule, inputs: Any, **kwargs: Any) -> Any:
        run_joint_passes(joint.graph, options, report, dump)
        return compat.default_partition(joint, inputs, **kwargs)

    return partition
