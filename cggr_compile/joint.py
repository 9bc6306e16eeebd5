"""Hangs the optimising passes into AOTAutograd: through Inductor's hooks, or through the partitioner."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from torch.fx import Graph, GraphModule

from cggr_compile import compat
from cggr_compile.graph_dump import GraphDump
from cggr_compile.options import Options
from cggr_compile.passes.collectives import schedule_collectives
from cggr_compile.pipeline import calls_our_operators, run_dense_passes, run_joint_passes
from cggr_compile.report import GraphReport


def sources() -> list[Path]:
    root = Path(__file__).parent
    # rglob does not follow the link that passes/ is in a checkout
    return sorted({*root.rglob("*.py"), *(root / "passes").rglob("*.py")})


@cache
def source_digest() -> str:
    """Hash of every source file of the package: out-of-tree lowerings and passes are not in Inductor's cache key."""
    return compat.hash_of_files(sources())


def joint_pre_pass(options: Options, report: GraphReport, dump: GraphDump, *, dense: bool = False) -> Any:
    """One pass object for Inductor's ``joint_custom_pre_pass``: ours, then whatever the user had set there.

    ``dense``: for a graph that is not rewritten, where what gathers parameters is all that there is to optimise.
    """
    run = run_dense_passes if dense else run_joint_passes
    return _pass(
        lambda graph: run(graph, options, report, dump), passes_key(options, report), compat.user_joint_passes()
    )


def collectives_pass() -> Any:
    """One pass object for Inductor's ``post_grad_custom_post_pass``: ours behind whatever the user had set there."""
    return _pass(schedule_collectives, (), compat.user_post_grad_passes(), last=True)


def passes_key(options: Options, report: GraphReport) -> tuple[str, str]:
    """Whatever the joint passes depend on, but for the sources and the printed graph; before they run."""
    # the printed graph does not show which of its nodes are recomputed (inline_checkpoints)
    facts = json.dumps([record.details for record in report.passes], sort_keys=True, default=str)
    return options.digest(), facts


def source_key() -> Any:
    """A ``joint_custom_pre_pass`` that changes nothing: it puts our sources into the key of Inductor's cache."""
    return _pass(lambda graph: None, (), compat.user_joint_passes())


def _pass(
    ours: Callable[[Graph], None],
    key: tuple[str, ...],
    others: tuple[Callable[..., Any], ...],
    *,
    last: bool = False,
) -> Any:
    """``others``: the user's own; ours run before them or, if ``last``, behind them."""

    class Pass(compat.custom_graph_pass()):  # type: ignore[misc]
        def __call__(self, graph: Graph) -> None:
            for one in (*others, ours) if last else (ours, *others):
                one(graph)

        def uuid(self) -> Any:
            keys = [getattr(other, "uuid", lambda: None)() for other in others]
            if any(key is None for key in keys):
                return None  # an unkeyed pass of the user: no caching
            return (source_digest(), *key, *keys)

    return Pass()


def holds_our_operators(gm: GraphModule) -> bool:
    """Whether a graph, or one inside it (the body of a checkpoint), calls a ``cggr::`` operator."""
    return any(calls_our_operators(module.graph) for module in gm.modules() if isinstance(module, GraphModule))


def partition_with_passes(
    options: Options, report: GraphReport, dump: GraphDump, *, dense: bool = False
) -> Callable[..., Any]:
    """A partition function that runs the passes over the joint graph first; ``dense``: of one that is not rewritten."""
    run = run_dense_passes if dense else run_joint_passes

    def partition(joint: GraphModule, inputs: Any, **kwargs: Any) -> Any:
        run(joint.graph, options, report, dump)
        return compat.default_partition(joint, inputs, **kwargs)

    return partition
