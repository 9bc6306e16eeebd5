"""The order of the passes; runs them over a graph and records what they did."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch.fx import Graph, GraphModule, Node

from cggr_compile import compat
from cggr_compile.causes import Cause
from cggr_compile.graph_dump import GraphDump
from cggr_compile.ops import UnresolvedMarkerError
from cggr_compile.options import OptionError, Options
from cggr_compile.passes.analysis.modes import remove_dead_code
from cggr_compile.passes.base import GraphContext, GraphPass, JointPass, PassResult, SemanticPass, refused
from cggr_compile.passes.facts import NoLayerStack, NoRouter, Routing
from cggr_compile.passes.joint.add_table_rows import AddTableRows
from cggr_compile.passes.joint.materialize_rotary_tables import MaterializeRotaryTables
from cggr_compile.passes.joint.merge_products import MergeProducts
from cggr_compile.passes.joint.merge_sums import MergeSums
from cggr_compile.passes.joint.reshard_after_forward import ReshardAfterForward
from cggr_compile.passes.joint.resolve_markers import ResolveMarkers
from cggr_compile.passes.joint.row_sparse import RowSparseBackward
from cggr_compile.passes.joint.sum_before_reducing import SumBeforeReducing
from cggr_compile.passes.semantic.align_targets import AlignTargets
from cggr_compile.passes.semantic.check_labels import CheckLabels
from cggr_compile.passes.semantic.choose_selection import ChooseSelection
from cggr_compile.passes.semantic.classify_outputs import ClassifyOutputs
from cggr_compile.passes.semantic.detach_outputs import DetachOutputs
from cggr_compile.passes.semantic.find_forwards import FindForwards
from cggr_compile.passes.semantic.find_loss import FindLoss
from cggr_compile.passes.semantic.find_stack import FindStack
from cggr_compile.passes.semantic.find_states import FindStates
from cggr_compile.passes.semantic.find_token_values import FindTokenValues
from cggr_compile.passes.semantic.functionalize import Functionalize
from cggr_compile.passes.semantic.group_queries import GroupQueries
from cggr_compile.passes.semantic.inline_checkpoints import InlineCheckpoints
from cggr_compile.passes.semantic.insert_router import InsertRouter
from cggr_compile.passes.semantic.launch_bound import LaunchBound
from cggr_compile.passes.semantic.lower_experts import LowerExperts
from cggr_compile.passes.semantic.lower_values import LowerValues
from cggr_compile.passes.semantic.make_sizes_static import MakeSizesStatic
from cggr_compile.passes.semantic.observe_router import ObserveRouter
from cggr_compile.passes.semantic.open_attention import OpenAttention
from cggr_compile.passes.semantic.recover_causal_mask import RecoverCausalMask
from cggr_compile.passes.semantic.return_figures import ReturnFigures
from cggr_compile.passes.semantic.rewrite_loss import RewriteLoss
from cggr_compile.passes.semantic.rewrite_values import RewriteValues
from cggr_compile.passes.semantic.route_gradient import RouteGradient
from cggr_compile.passes.semantic.select_rows import SelectRows
from cggr_compile.passes.semantic.shorten_last_block import ShortenLastBlock
from cggr_compile.passes.semantic.spell_losses import SpellLosses
from cggr_compile.passes.semantic.split_reductions import SplitReductions
from cggr_compile.passes.semantic.top_entropy import TopEntropy
from cggr_compile.passes.semantic.train_predictor import TrainPredictor
from cggr_compile.passes.semantic.trained_inputs import TrainedInputs
from cggr_compile.report import GraphReport, PassRecord, operator_counts

log = logging.getLogger(__name__)

SWITCHED_OFF = "switched off (disable_passes)"
OF_LAYERS = "it works on the layers, and no stack of them was found"
# Every pass, in order. ``check_order`` holds it to what the passes declare, at import.
PASSES: tuple[GraphPass, ...] = (
    InlineCheckpoints(),
    MakeSizesStatic(),
    Functionalize(),
    LowerExperts(),
    OpenAttention(),
    SpellLosses(),
    FindForwards(),
    FindLoss(),
    SplitReductions(),
    LowerValues(),
    FindTokenValues(),
    FindStack(),
    FindStates(),
    ClassifyOutputs(),
    RecoverCausalMask(),
    GroupQueries(),
    LaunchBound(),
    AlignTargets(),
    ChooseSelection(),
    TrainedInputs(),
    CheckLabels(),
    TopEntropy(),
    ShortenLastBlock(),
    InsertRouter(),
    ObserveRouter(),
    SelectRows(),
    RewriteLoss(),
    RewriteValues(),
    TrainPredictor(),
    ReturnFigures(),
    RouteGradient(),
    DetachOutputs(),
    RowSparseBackward(),
    MergeProducts(),
    MergeSums(),
    SumBeforeReducing(),
    AddTableRows(),
    MaterializeRotaryTables(),
    ResolveMarkers(),
    ReshardAfterForward(),
)


def check_order(passes: Sequence[GraphPass]) -> None:
    """Hold an order to what its passes declare.

    Raises:
        ValueError: two passes of one name; a semantic pass behind a joint one; a fact that no earlier pass leaves, or
            one that may be switched off.
    """
    names: set[str] = set()
    left: dict[type, bool] = {}  # whether a pass that always runs leaves it
    stages = [p.stage for p in passes]
    if stages != sorted(stages, key=("semantic", "joint").index):
        raise ValueError("semantic passes come before joint ones")
    for one in passes:
        if one.name in names:
            raise ValueError(f"two passes are named {one.name}")
        names.add(one.name)
        if not isinstance(one, SemanticPass):
            continue
        for fact in (*one.needs, *one.uses):
            if fact not in left:
                raise ValueError(f"{one.name} reads {fact.__name__}, which no earlier pass leaves")
        for fact in one.needs:
            if not left[fact]:
                raise ValueError(f"{one.name} needs {fact.__name__}, which an optional pass leaves: it is a use")
        for fact in one.provides:
            left[fact] = left.get(fact, False) or not one.optional


check_order(PASSES)


def check_disabled(options: Options) -> None:
    """Hold the option ``disable_passes`` to the names of optional passes.

    Raises:
        OptionError: it names something else.
    """
    optional = sorted(p.name for p in PASSES if p.optional)
    for name in options.disable_passes:
        if name not in optional:
            why = "the graph is wrong without it" if name in {p.name for p in PASSES} else "there is no such pass"
            raise OptionError(f"disable_passes may name {optional}, got {name!r}: {why}")


def semantic_passes(ctx: GraphContext) -> list[SemanticPass]:
    """The semantic passes that have a turn in this graph, in order."""
    return [p for p in PASSES if isinstance(p, SemanticPass) and p.enabled(ctx)]


def joint_passes(options: Options) -> list[JointPass]:
    """The optimising passes that have a turn, in order."""
    return [p for p in PASSES if isinstance(p, JointPass) and p.enabled(options)]


def rewrite(
    gm: GraphModule, ctx: GraphContext, report: GraphReport, dump: GraphDump, failed_router: str = ""
) -> GraphModule:
    """Run the semantic passes over a copy of ``gm``.

    A router that fails is left out (``failed_router`` says why): everything begins anew, as it may have left its graph
    half rewritten, and ``SelectRows`` says what becomes of the selection. Any other failure leaves the graph as
    captured.

    Returns:
        the rewritten copy, or ``gm`` itself if a pass refused it, or one failed; ``report`` says which and why.

    Raises:
        OptionError: an option that does not fit this model.
    """
    work, begin, asked = copy_module(gm), replace(ctx), ctx.options.selection
    for graph_pass in semantic_passes(ctx):
        off = SWITCHED_OFF if graph_pass.name in ctx.options.disable_passes else ""
        if graph_pass.name == InsertRouter.name and ctx.options.needs_router and (off or failed_router):
            off = failed_router or off
            ctx.add(NoRouter(off))
        if off:
            report.passes.append(PassRecord(graph_pass.name, graph_pass.stage, False, off))
            continue
        ctx.running = graph_pass
        record = run_pass(graph_pass, work.graph, report, lambda p=graph_pass: apply(p, work, ctx))  # type: ignore[misc]
        ctx.running = None
        if record.cause is Cause.INTERNAL_ERROR and graph_pass.name == InsertRouter.name:
            ctx.restart(begin)
            report.passes.clear()
            return rewrite(gm, ctx, report, dump, record.reason)
        if record.matched:
            dump.stage(graph_pass.name, work, record)
        elif record.cause is not None:
            report.refuse(record.cause, f"{graph_pass.name}: {record.reason}")
            return gm
    # only now: what one pass inserts, a later one may be the first to use
    remove_dead_code(work.graph)
    work.recompile()
    dump.stage("rewritten", work)
    if ctx.dense:
        name = "the schedule's ratio" if ctx.scheduled else "min_tokens_ratio"
        report.refuse(Cause.EVERY_TOKEN, Cause.EVERY_TOKEN.says(name=name))
        return work
    report.level, report.cause, report.ratio = ctx.level, None, float(ctx.options.ratio)
    exact = any(routing.gradient == "exact" for routing in ctx.every(Routing))
    report.gradient, report.selection = "exact" if exact else "routed", ctx.options.selection
    if report.level == "loss":
        refusal = ctx.every(NoLayerStack)[0].refusal
        assert refusal.cause is not None
        report.refuse(refusal.cause, f"{FindStack.name}: {refusal.reason}")
    found = FindStack.name if report.level == "routed" else FindStates.name
    told = [report.record(name) for name in (found, SelectRows.name)]
    told += [report.record(ChooseSelection.name)] if ctx.options.selection != asked else []
    told += [record for record in report.passes if record.name == TrainedInputs.name and record.details]
    told += [record for record in report.passes if record.name == RouteGradient.name and "gated" in record.details]
    report.reason = "; ".join(record.reason for record in told if record is not None)
    return work


def apply(graph_pass: SemanticPass, gm: GraphModule, ctx: GraphContext) -> PassResult:
    """Run a pass, for each of the graph's forwards where it looks at one."""
    if graph_pass.whole_graph:
        return _turn(graph_pass, gm, ctx)
    results = []
    for forward in ctx.forwards:
        with ctx.of(forward):
            results.append(_turn(graph_pass, gm, ctx))
        if results[-1].cause is not None:  # all forwards are rewritten, or none
            return results[-1]
    return _together(results)


def _turn(graph_pass: SemanticPass, gm: GraphModule, ctx: GraphContext) -> PassResult:
    if graph_pass.level == "routed" and ctx.level != "routed":
        return PassResult(False, OF_LAYERS)
    return graph_pass(gm, ctx)


def _together(results: Sequence[PassResult]) -> PassResult:
    """What a pass did to several forwards, as one result."""
    first, *others = results
    if not others:
        return first
    reason = f"in each of {len(results)} forwards: {first.reason}"
    if any(other.reason != first.reason for other in others):
        reason = "; ".join(f"forward {number}: {result.reason}" for number, result in enumerate(results, 1))
    details = {f"forward {number}": result.details for number, result in enumerate(results, 1) if result.details}
    return PassResult(any(result.matched for result in results), reason, details)


def calls_our_operators(graph: Graph) -> bool:
    """Whether a graph, not counting those inside it, calls a ``cggr::`` operator."""
    targets = (node.target for node in graph.nodes)
    return any(isinstance(target, compat.OpOverload) and target.namespace == "cggr" for target in targets)


def run_joint_passes(graph: Graph, options: Options, report: GraphReport, dump: GraphDump) -> None:
    """Run the optimising passes over a joint graph, in place.

    Inductor hands over the graphs inside that graph as well, such as a score function of FlexAttention: none of our
    operators is in those, and they are left alone.
    """
    if not calls_our_operators(graph):
        return
    _run(joint_passes(options), graph, options, report, dump)


def run_dense_passes(graph: Graph, options: Options, report: GraphReport, dump: GraphDump) -> None:
    """The same for a joint graph that was not rewritten: those passes that are for every graph."""
    _run([p for p in joint_passes(options) if p.dense], graph, options, report, dump)


def _run(passes: Sequence[JointPass], graph: Graph, options: Options, report: GraphReport, dump: GraphDump) -> None:
    owner = graph.owning_module
    assert owner is not None
    dump.stage("joint", owner)
    for joint_pass in passes:
        if joint_pass.name in options.disable_passes:
            report.passes.append(PassRecord(joint_pass.name, joint_pass.stage, False, SWITCHED_OFF))
            continue
        record = run_pass(joint_pass, graph, report, lambda p=joint_pass: p(graph))  # type: ignore[misc]
        if record.matched:
            dump.stage(f"joint_{joint_pass.name}", owner, record)
    owner.recompile()


def strict() -> bool:
    """Whether a pass that fails raises (``CGGR_STRICT=1``, for tests) instead of leaving the graph dense."""
    return os.environ.get("CGGR_STRICT") == "1"


def run_pass(graph_pass: GraphPass, graph: Graph, report: GraphReport, call: Callable[[], PassResult]) -> PassRecord:
    """Run one pass and record what it did. One that fails may leave its graph half rewritten."""
    name, stage = graph_pass.name, graph_pass.stage
    before, begin = operator_counts(graph), time.perf_counter()
    try:
        result = call()
        graph.lint()
    except (OptionError, UnresolvedMarkerError):
        raise
    except Exception as error:
        if stage == "joint" or strict():
            raise  # a half-rewritten backward must not run
        log.exception("pass %s failed", name)
        result = refused(Cause.INTERNAL_ERROR, name=name, error=f"{type(error).__name__}: {error}")
    after = operator_counts(graph)
    record = PassRecord(
        name,
        stage,
        result.matched,
        result.reason,
        result.details,
        cause=result.cause,
        added=dict(after - before),
        removed=dict(before - after),
        seconds=time.perf_counter() - begin,
    )
    log.info("%s: %s, %s", name, "matched" if record.matched else "no match", record.reason)
    report.passes.append(record)
    return record


def copy_module(gm: GraphModule) -> GraphModule:
    """A copy that passes may change, with everything that AOTAutograd reads off a Dynamo graph."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    copied = GraphModule(gm, graph, class_name=type(gm).__name__)
    copied.meta = dict(gm.meta)
    compat.copy_sources(gm, copied, mapping)
    return copied
