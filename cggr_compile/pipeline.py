"""The order of the passes; runs them over a graph and records what they did."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping

import torch
from torch.fx import Graph, GraphModule, Node

from cggr_compile.ops import UnresolvedMarkerError
from cggr_compile.options import OptionError
from cggr_compile.passes.angles_once import ComputeAnglesOnce
from cggr_compile.passes.base import GraphContext, GraphPass, JointPass, PassResult
from cggr_compile.passes.candidates import AlignTargets
from cggr_compile.passes.causal_mask import RecoverCausalMask
from cggr_compile.passes.check_labels import CheckLabels
from cggr_compile.passes.classify_outputs import ClassifyOutputs
from cggr_compile.passes.detach_outputs import DetachOutputs
from cggr_compile.passes.find_loss import FindLoss
from cggr_compile.passes.find_stack import FindStack
from cggr_compile.passes.functionalize import Functionalize
from cggr_compile.passes.fx import mutated_operand
from cggr_compile.passes.grouped_query import GroupQueries
from cggr_compile.passes.inline_checkpoints import InlineCheckpoints
from cggr_compile.passes.insert_router import InsertRouter
from cggr_compile.passes.launch_bound import LaunchBound
from cggr_compile.passes.lower_experts import LowerExperts
from cggr_compile.passes.merge_products import MergeProducts
from cggr_compile.passes.merge_sums import MergeSums
from cggr_compile.passes.modes import changes_modes
from cggr_compile.passes.observe_router import ObserveRouter
from cggr_compile.passes.resolve_markers import ResolveMarkers
from cggr_compile.passes.rewrite_loss import RewriteLoss
from cggr_compile.passes.route_gradient import RouteGradient
from cggr_compile.passes.row_sparse import RowSparseBackward
from cggr_compile.passes.select_rows import SelectRows
from cggr_compile.passes.static_sizes import MakeSizesStatic
from cggr_compile.passes.trained_inputs import TrainedInputs
from cggr_compile.report import GraphDump, GraphReport, PassRecord, operator_counts

log = logging.getLogger(__name__)

# Semantic passes over the Dynamo graph that leave the mathematics alone: all that run at ratio 1.0.
EXACT_PASSES: tuple[GraphPass, ...] = (
    Functionalize(),
    LowerExperts(),
    FindLoss(),
    FindStack(),
    ClassifyOutputs(),
    RecoverCausalMask(),
    GroupQueries(),
)
# The semantic passes, in order. Checkpoints stay closed at ratio 1.0, where nothing inside them would be changed.
DYNAMO_PASSES: tuple[GraphPass, ...] = (
    InlineCheckpoints(),
    MakeSizesStatic(),
    *EXACT_PASSES,
    LaunchBound(),
    AlignTargets(),
    TrainedInputs(),
    CheckLabels(),
    InsertRouter(),
    SelectRows(),
    RewriteLoss(),
    RouteGradient(),
    DetachOutputs(),
)
# At ratio 1.0, where the schedule depends on the router.
OBSERVING_PASSES: tuple[GraphPass, ...] = (AlignTargets(), InsertRouter(), ObserveRouter())
# Optimising passes over AOTAutograd's joint graph, in order. They must be exact.
JOINT_PASSES: tuple[JointPass, ...] = (
    RowSparseBackward(),
    MergeProducts(),
    MergeSums(),
    ComputeAnglesOnce(),
    ResolveMarkers(),
)


# What the graph is without an optional pass, where that is not the same model.
_WITHOUT = {
    RouteGradient.name: "the gradient of the selected loss is not routed: as gradient='exact' has it",
    DetachOutputs.name: "outputs besides the loss keep their gradient",
}


def rewrite(
    gm: GraphModule,
    ctx: GraphContext,
    report: GraphReport,
    dump: GraphDump,
    failed: Mapping[str, str] | None = None,
) -> GraphModule:
    """Run the semantic passes over a copy of ``gm``.

    A pass that raises may leave a graph half rewritten. Everything then begins anew without it, if it is optional;
    ``failed`` says which did, and why. ``ctx.warnings`` tells the user.

    Returns:
        the rewritten copy, or ``gm`` itself if a required pass did not match; ``report`` says which and why.

    Raises:
        OptionError: an option that does not fit this model.
    """
    failed = failed or {}
    work, begin = copy_module(gm), copy.copy(ctx)
    begin.notices, begin.warnings = [], []
    for graph_pass in semantic_passes(ctx):
        try:
            record = _run_semantic(graph_pass, work, ctx, report, failed)
        except (OptionError, UnresolvedMarkerError):
            raise
        except Exception as error:
            why = f"internal error: {type(error).__name__}: {error}"
            if graph_pass.required:
                log.exception("pass %s failed; the graph is compiled as it was captured", graph_pass.name)
                record = _note(report, PassRecord(graph_pass.name, "dynamo", False, why))
            else:
                log.exception("pass %s failed; the graph is rewritten without it", graph_pass.name)
                vars(ctx).update(vars(begin))
                report.passes.clear()
                return rewrite(gm, ctx, report, dump, {**failed, graph_pass.name: why})
        if record.matched:
            dump.stage(graph_pass.name, work, record)
        elif graph_pass.required:
            report.reason = f"{graph_pass.name}: {record.reason}"
            return gm
    # only now: what one pass inserts, a later one may be the first to use
    work.graph.eliminate_dead_code(is_impure_node=_has_effect)
    work.recompile()
    dump.stage("rewritten", work)
    if ctx.dense:
        name = "the schedule's ratio" if ctx.rung else "min_tokens_ratio"
        report.reason = f"{name} is 1.0: every token is trained on"
        return work
    assert ctx.options.min_tokens_ratio != "auto"
    report.matched, report.ratio = True, ctx.options.min_tokens_ratio
    report.gradient = ctx.gradient
    told = [report.record(name) for name in (FindStack.name, SelectRows.name)]
    told += [record for record in report.passes if record.name == TrainedInputs.name and record.details]
    report.reason = "; ".join(record.reason for record in told if record is not None)
    return work


def _run_semantic(
    graph_pass: GraphPass, work: GraphModule, ctx: GraphContext, report: GraphReport, failed: Mapping[str, str]
) -> PassRecord:
    name = graph_pass.name
    if name not in failed:
        return run_pass(name, "dynamo", work.graph, report, lambda: graph_pass(work, ctx))
    why = f"{failed[name]}. This is a bug of cggr_compile"
    if name == InsertRouter.name:
        ctx.unrouted = why  # select_rows says what becomes of the selection
    else:
        ctx.warnings.append(f"{_WITHOUT.get(name, 'the graph is rewritten without it')}: pass {name} failed: {why}")
    return _note(report, PassRecord(name, "dynamo", False, failed[name]))


def _note(report: GraphReport, record: PassRecord) -> PassRecord:
    report.passes.append(record)
    return record


def _has_effect(node: Node) -> bool:
    return node.is_impure() or mutated_operand(node) is not None or changes_modes(node)


def semantic_passes(ctx: GraphContext) -> tuple[GraphPass, ...]:
    """The semantic passes for this ratio, in order."""
    if not ctx.dense:
        return DYNAMO_PASSES
    # a rung that is compiled later can have no guards on symbolic sizes
    before = (MakeSizesStatic(),) if ctx.rung else ()
    after = OBSERVING_PASSES if ctx.rung and ctx.options.dynamic_threshold else ()
    return (*before, *EXACT_PASSES, *after)


def joint_passes(report: GraphReport) -> list[JointPass]:
    """The optimising passes that the options ask for."""
    return [p for p in JOINT_PASSES if report.options["row_sparse"] or isinstance(p, ResolveMarkers)]


def calls_our_operators(graph: Graph) -> bool:
    """Whether a graph, not counting those inside it, calls a ``cggr::`` operator."""
    targets = (node.target for node in graph.nodes)
    return any(isinstance(target, torch._ops.OpOverload) and target.namespace == "cggr" for target in targets)


def run_joint_passes(graph: Graph, report: GraphReport, dump: GraphDump) -> None:
    """Run the optimising passes over a joint graph, in place.

    Inductor hands over the graphs inside that graph as well, such as a score function of FlexAttention: none of our
    operators is in those, and they are left alone.
    """
    if not calls_our_operators(graph):
        return
    owner = graph.owning_module
    assert owner is not None
    for joint_pass in joint_passes(report):
        record = run_pass(joint_pass.name, "joint", graph, report, lambda p=joint_pass: p(graph))  # type: ignore[misc]
        if record.matched:
            dump.stage(f"joint_{joint_pass.name}", owner, record)
    owner.recompile()


def run_pass(name: str, stage: str, graph: Graph, report: GraphReport, call: Callable[[], PassResult]) -> PassRecord:
    """Run one pass and record what it did. What it raises is raised: its graph may be half rewritten."""
    before, begin = operator_counts(graph), time.perf_counter()
    result = call()
    graph.lint()
    after = operator_counts(graph)
    record = PassRecord(
        name,
        stage,
        result.matched,
        result.reason,
        result.details,
        added=dict(after - before),
        removed=dict(before - after),
        seconds=time.perf_counter() - begin,
    )
    log.info("%s: %s, %s", name, "matched" if record.matched else "no match", record.reason)
    return _note(report, record)


def copy_module(gm: GraphModule) -> GraphModule:
    """A copy that passes may change, with everything that AOTAutograd reads off a Dynamo graph."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        if hasattr(node, "_dynamo_source"):
            mapping[node]._dynamo_source = node._dynamo_source
    copied = GraphModule(gm, graph, class_name=type(gm).__name__)
    copied.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        copied._param_name_to_source = gm._param_name_to_source
    return copied
