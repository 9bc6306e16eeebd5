"""Hands a graph to the compiler that lowers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import GraphModule

from cggr_compile import compat
from cggr_compile.configuration import Configuration
from cggr_compile.engine import Engine
from cggr_compile.graph_dump import GraphDump
from cggr_compile.joint import (
    collectives_pass,
    holds_our_operators,
    joint_pre_pass,
    partition_with_passes,
    source_key,
)
from cggr_compile.options import Options
from cggr_compile.report import GraphReport

# The gathers of all layers read the selected positions. Only those of one layer are worth fusing, a dozen; to try each
# with each takes Inductor longer, the more layers there are.
MAX_FUSION_PAIRS = 16


def lower_dense(
    gm: GraphModule, inputs: list[Any], configuration: Configuration, report: GraphReport, dump: GraphDump
) -> Callable[..., Any]:
    """Compile a graph that trains on every position, or does not train. A compiler may change the graph."""
    options, sharded = configuration.options, any(map(compat.is_sharded, inputs))
    if configuration.engine == "eager":
        if sharded and report.training:
            return compat.aot_eager(gm, inputs, partition_with_passes(options, report, dump, dense=True))
        return gm.forward
    patches = dict(configuration.patches)
    if sharded:
        patches["joint_custom_pre_pass"] = joint_pre_pass(options, report, dump, dense=True)
    elif holds_our_operators(gm):  # a layer of ours, or lowered experts: the cache key must know our sources
        patches["joint_custom_pre_pass"] = source_key()
    return compat.compile_fx(gm, inputs, {**_collectives(inputs), **patches})


def lower_selective(
    gm: GraphModule,
    inputs: list[Any],
    engine: Engine,
    options: Options,
    report: GraphReport,
    dump: GraphDump,
    patches: Mapping[str, Any],
) -> Callable[..., Any]:
    """Compile a rewritten graph, with the optimising passes that the options ask for."""
    if engine == "eager":
        return compat.aot_eager(gm, inputs, partition_with_passes(options, report, dump))
    passes = {"joint_custom_pre_pass": joint_pre_pass(options, report, dump)}
    settings = {**compat.fusion_limit(MAX_FUSION_PAIRS), **_collectives(inputs)}
    return compat.compile_fx(gm, inputs, {**settings, **patches, **passes})


def _collectives(inputs: list[Any]) -> dict[str, Any]:
    """Inductor's settings for a graph that gathers its parameters; the user's own go before them."""
    if not any(map(compat.is_sharded, inputs)):
        return {}
    return {**compat.IN_PLACE, "post_grad_custom_post_pass": collectives_pass()}
