"""Compiles one captured graph: rewrites it for every ratio, says what came of it, and makes the step that runs it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Module

from cggr_compile import compat, recompile_limit
from cggr_compile.causes import Cause
from cggr_compile.compiled_step import CompiledStep
from cggr_compile.compiled_variant import CompiledVariant, nothing_to_verify
from cggr_compile.configuration import Configuration
from cggr_compile.data_parallel import agreement_for, hand_back
from cggr_compile.default_loss import name_default_loss
from cggr_compile.diagnose import at_compiled_call, break_ahead, find_cause
from cggr_compile.graph_variant import GraphVariant
from cggr_compile.options import AUTO, Options
from cggr_compile.passes.joint.reshard_after_forward import ReshardAfterForward
from cggr_compile.passes.semantic.make_sizes_static import has_symbolic_sizes
from cggr_compile.registry import registry
from cggr_compile.report import GraphReport
from cggr_compile.runtime import Runtime
from cggr_compile.runtime_resolver import RuntimeResolver
from cggr_compile.schedule import round_up, rungs
from cggr_compile.sharding import sharding_of
from cggr_compile.training_graph import is_training
from cggr_compile.variant_dispatcher import Key, VariantDispatcher

log = logging.getLogger(__name__)


def compile_captured(gm: GraphModule, inputs: list[Any], options: Options, mode: str | None) -> Callable[..., Any]:
    """What Dynamo is to call in place of ``gm``. To be called while Dynamo captures it.

    Raises:
        OptionError: an option that does not fit the machine or the model.
    """
    if name_default_loss(*break_ahead()):
        compat.capture_again()
    configuration = Configuration.of(options, mode, inputs)
    resolver = RuntimeResolver(gm, inputs)
    runtime, sharding = resolver.runtime, sharding_of(resolver.module)
    if sharding is not None and not sharding.reshard_after_forward:
        configuration = configuration.without(ReshardAfterForward.name)
    if configuration.notice:
        runtime.notify(configuration.notice)
    training, refusal = is_training(gm, inputs)
    if training:
        _join(runtime, resolver, options)
    ratios = rungs(options) if training else (1.0,)
    every: dict[Key, GraphVariant] = {}

    def variant_at(ratio: float, growth: int = 0) -> GraphVariant:
        report = GraphReport(
            index=sum(r.training == training for r in runtime.reports),
            training=training,
            compiler=configuration.engine,
            options=options.as_dict(),
            reason=Cause.NOT_TRAINING.says(),
        )
        if refusal is not None:
            report.refuse(*refusal)
        rewritable, scheduled = training and refusal is None, len(ratios) > 1
        variant = GraphVariant.of(
            gm,
            inputs,
            configuration,
            ratio,
            report,
            rewritable=rewritable,
            scheduled=scheduled,
            growth=growth,
            first_batch=None if runtime.agreement is None else runtime.first_batch,
        )
        first_refused = training and not every and not variant.selective  # where the first is, all are
        wanting = refusal is None and (first_refused or report.level == "loss")
        if wanting and (found := find_cause(gm.graph, report.cause)) is not None:
            report.refuse(*found)
        if first_refused:
            if runtime.agreement is not None and not any(r.matched for r in runtime.reports):
                runtime.agreement.leave(f"this process trains on every token: {report.reason}")
            hand_back(report.cause, report.reason)
        resolver.begin(report, options)
        return variant

    smallest = variant_at(ratios[-1])  # where that cannot be done, nothing below 1.0 can
    _tell(inputs, smallest, runtime)
    every[ratios[-1], 0] = smallest
    if smallest.selective:
        if options.selection == AUTO and smallest.ctx.options.selection != "importance":
            runtime.share_growth()
        every |= {(ratio, 0): variant_at(ratio) for ratio in ratios[:-1]}
        grown = range(1, smallest.doublings + 1)
        every |= {(ratio, growth): variant_at(ratio, growth) for ratio in ratios if ratio < 1.0 for growth in grown}
    variants = _dispatcher(every, inputs, options, resolver)
    resolver.end_capture()
    return CompiledStep(options, resolver, variants)


def _join(runtime: Runtime, resolver: RuntimeResolver, options: Options) -> None:
    """Decide together with the other processes of this training, if there are any, and something to decide."""
    decides = AUTO in (options.selection, options.min_tokens_ratio) or options.dynamic_threshold or options.verify
    decides = decides or options.predicts
    if not decides or options.min_tokens_ratio == 1.0 or runtime.agreement is not None or runtime.is_observed:
        return
    agreement = agreement_for(resolver.module)
    if agreement is not None:
        runtime.join(agreement, options)


def _tell(inputs: Sequence[Any], variant: GraphVariant, runtime: Runtime) -> None:
    """Say what came of the rewriting, and watch for Dynamo giving up."""
    report, options = variant.report, variant.configuration.options
    if variant.selective:
        for notice in variant.ctx.notices:
            runtime.notify(notice)
        for warning in variant.ctx.warnings:
            runtime.warn(warning)
    if variant.selective or (not variant.training and at_compiled_call()):
        trained = [weakref.ref(t) for t in inputs if isinstance(t, Tensor) and t.requires_grad]
        recompile_limit.watch(partial(_given_up, weakref.ref(runtime), trained, options))
    if variant.training and report.level != "routed" and not variant.ctx.dense:
        runtime.fall_back(report)
    if variant.training and not variant.selective and options.verify:
        nothing_to_verify(runtime, report, f"the graph is not rewritten: {report.reason}")


def _given_up(
    compiled_for: weakref.ref[Runtime],
    trained: list[weakref.ref[Tensor]],
    options: Options,
    model: Module | None,
    reason: str,
) -> None:
    """Dynamo has given up on the code that ``model`` runs (None: unknown, it counts as the one it was compiled for)."""
    runtime = compiled_for() if model is None else registry.of_module(model)
    if runtime is not None:
        parameters = [p for ref in trained if (p := ref()) is not None]
        runtime.give_up(
            reason, options, parameters if model is None else [p for p in model.parameters() if p.requires_grad]
        )


def _dispatcher(
    every: dict[Key, GraphVariant], inputs: list[Any], options: Options, resolver: RuntimeResolver
) -> VariantDispatcher:
    """Only what the first step needs is compiled now.

    A graph whose sizes stay symbolic is compiled now as well: it puts guards on them, which Dynamo collects here.
    """
    measured = options.min_tokens_ratio == "auto"
    for variant in every.values():
        variant.pin_sizes()
    first = next(iter(every))
    if len(every) > 1:
        first = round_up(resolver.runtime.preview(options), [ratio for ratio, _ in every]), 0
    compiled = {first: _at_capture(every[first], inputs, resolver, measured)}
    waiting = {}
    compilation = compat.compilation_id()
    for key, variant in every.items():
        if key == first:
            continue
        if variant.static is None and has_symbolic_sizes(variant.graph):
            with compat.separate_tracing_context():
                compiled[key] = _at_capture(variant, inputs, resolver, measured)
        else:
            variant.report.waiting = True
            variant.dump.finish()
            variant.ctx.example_inputs = []  # the model's parameters and a batch: not to be kept alive
            waiting[key] = partial(_after_capture, variant, resolver, measured, compilation)
    return VariantDispatcher(compiled, waiting)


def _at_capture(
    variant: GraphVariant, inputs: Sequence[Any], resolver: RuntimeResolver, measured: bool
) -> CompiledVariant:
    """Compile a variant while Dynamo captures it."""
    if variant.static is None:
        return _compiled(variant, inputs, resolver, measured)
    with compat.tracing_under(variant.ctx.fake_mode):
        return _compiled(variant, inputs, resolver, measured)


def _after_capture(
    variant: GraphVariant, resolver: RuntimeResolver, measured: bool, compilation: Any, inputs: Sequence[Any]
) -> CompiledVariant:
    """Compile a variant at the first step that needs it."""
    fake_mode = variant.ctx.fake_mode if variant.static is not None else None
    with compat.compiling_later(compilation, fake_mode), compat.no_saved_tensors_hooks():
        return _compiled(variant, inputs, resolver, measured)


def _compiled(
    variant: GraphVariant, inputs: Sequence[Any], resolver: RuntimeResolver, measured: bool
) -> CompiledVariant:
    report = variant.report
    log.info("graph %d compiled by %s: %s", report.index, report.compiler, report.reason)
    compiled = CompiledVariant(variant, inputs, resolver, measured)
    report.waiting = False
    variant.dump.finish()
    return compiled
