"""The graphs of one training step that are counted: the dense one and the rewritten one, each as its two halves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import Module

from cggr_compile import compat
from cggr_compile.configuration import Configuration
from cggr_compile.graph_dump import GraphDump
from cggr_compile.graph_variant import GraphVariant
from cggr_compile.options import Options
from cggr_compile.passes.analysis.modes import remove_dead_code
from cggr_compile.passes.facts import Candidates, Outputs, Selection
from cggr_compile.passes.nodes import fake_value
from cggr_compile.passes.step_interface import example_step_inputs
from cggr_compile.pipeline import copy_module, run_joint_passes
from cggr_compile.registry import registry
from cggr_compile.report import GraphReport
from cggr_compile.schedule import rungs
from cggr_compile.training_graph import is_training


@dataclass
class Halves:
    """Forward and backward pass, cut as Inductor does it.

    Attributes:
        names: of the forward's inputs, "" for those that are none of the user's. trained: which are parameters.
        results: how many the forward returns before what it keeps for the backward pass.
    """

    forward: GraphModule
    backward: GraphModule
    names: list[str]
    trained: list[bool]
    results: int


@dataclass
class Captured:
    """One training graph.

    Attributes:
        dense: as it was captured, differentiated from the loss alone. selective: rewritten; None where it stays dense.
        tokens: batch size and length, where there is a batch of tokens.
        rows: of one sequence, by name: those with loss and those with gradient.
    """

    dense: Halves
    selective: Halves | None
    tokens: tuple[int, int] | None
    rows: dict[str, int]


def capture(model: Module, args: Sequence[Any], kwargs: Mapping[str, Any], options: Options) -> list[Captured]:
    """The training graphs of ``model(*args, **kwargs)``, compiled aside by nothing: the forward runs as it is.

    A schedule's graph is that of its smallest ratio.
    """
    found: list[Captured] = []
    settings = replace(options, compiler="eager", fallback="silent", verify=False, dump_dir=None, launch_bound="select")

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        training, refusal = is_training(gm, inputs)
        if training:
            found.append(_captured(gm, inputs, settings, rewritable=refusal is None))
        return gm.forward

    with ExitStack() as stack:
        stack.enter_context(registry.replaced(compat.original_module(model)))
        stack.enter_context(torch.random.fork_rng())
        torch.compile(compat.original_module(model).forward, backend=backend)(*args, **kwargs)
    return found


def _captured(gm: GraphModule, inputs: list[Any], options: Options, *, rewritable: bool) -> Captured:
    selective = _variant(gm, inputs, options, rungs(options)[-1], rewritable)
    dense = _variant(gm, inputs, options, 1.0, rewritable)
    objective = {place for outputs in selective.ctx.every(Outputs) for place in outputs.objective}
    graph = _with_results(dense.graph, objective) if objective else dense.graph
    tokens, rows = None, dict[str, int]()
    if selective.selective:
        tokens, rows = _sizes_of_selection(selective)
    tokens = tokens or _sizes_of_tokens(gm)
    ours = _halves(selective, selective.graph, inputs) if selective.selective else None
    return Captured(_halves(dense, graph, inputs), ours, tokens, rows)


def _variant(gm: GraphModule, inputs: list[Any], options: Options, ratio: float, rewritable: bool) -> GraphVariant:
    report = GraphReport(index=0, training=True, compiler="eager", options=options.as_dict())
    configuration = Configuration.of(options, None, inputs)
    return GraphVariant.of(
        gm, inputs, configuration, ratio, report, rewritable=rewritable, scheduled=False, dumped=False
    )


def _halves(variant: GraphVariant, graph: GraphModule, inputs: Sequence[Any]) -> Halves:
    kept = range(len(inputs)) if variant.static is None else variant.static.kept
    arguments = [inputs[place] for place in kept]
    placeholders = list(graph.graph.find_nodes(op="placeholder"))
    names = [compat.source_name(node) for node in placeholders]
    trained = [isinstance(value, torch.nn.Parameter) for value in arguments]
    further = example_step_inputs(graph.graph, len(arguments))
    trained += [False for _ in further]
    report, found = variant.report, list[Halves]()

    def partition(joint: GraphModule, example: Any, **settings: Any) -> Any:
        if variant.selective:
            run_joint_passes(joint.graph, variant.ctx.options, report, GraphDump(None, report))
        forward, backward = compat.minimum_partition(joint, example, **settings)
        found.append(Halves(forward, backward, names, trained, settings["num_fwd_outputs"]))
        return forward, backward

    static = nullcontext() if variant.static is None else compat.tracing_under(variant.ctx.fake_mode)
    with static, compat.static_inputs(further), compat.separate_tracing_context():
        compat.aot_eager(graph, [*arguments, *further], partition)
    return found[0]


def _with_results(gm: GraphModule, places: set[int]) -> GraphModule:
    """A copy that returns only some of the results."""
    work = copy_module(gm)
    output = work.graph.output_node()
    output.args = (tuple(value for place, value in enumerate(output.args[0]) if place in places),)  # type: ignore[arg-type]
    remove_dead_code(work.graph)
    work.recompile()
    return work


def _sizes_of_selection(variant: GraphVariant) -> tuple[tuple[int, int], dict[str, int]]:
    selection, candidates = variant.ctx.every(Selection)[0], variant.ctx.every(Candidates)[0]
    batch, length = map(int, _shape(candidates.valid))
    rows = {"rho": int(_shape(selection.rows)[1])}
    if selection.gradient is not None:
        rows["r"] = int(_shape(selection.gradient.rows)[1])
    return (batch, length), rows


def _sizes_of_tokens(gm: GraphModule) -> tuple[int, int] | None:
    """Of the largest table of integers among the inputs."""
    values = [fake_value(node) for node in gm.graph.find_nodes(op="placeholder")]
    tables = [v.shape for v in values if isinstance(v, Tensor) and v.dim() == 2 and not v.is_floating_point()]
    return max(((int(b), int(s)) for b, s in tables), key=lambda shape: shape[0] * shape[1], default=None)


def _shape(node: Node) -> Any:
    value = fake_value(node)
    assert isinstance(value, Tensor)
    return value.shape
