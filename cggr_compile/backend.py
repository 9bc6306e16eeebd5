"""The ``torch.compile`` backend ``"cggr"``."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Module, Parameter

from cggr_compile import compat, lowerings, pass_records, recompile_limit
from cggr_compile.aside import Aside, written_inputs
from cggr_compile.captured_reference import CapturedReference
from cggr_compile.causes import Cause
from cggr_compile.dense_layers import dense_layers
from cggr_compile.diagnose import at_compiled_call, find_cause
from cggr_compile.joint import holds_our_operators, joint_pre_pass, partition_with_passes, source_key
from cggr_compile.ladder import Ladder, Rung
from cggr_compile.options import OptionError, Options
from cggr_compile.passes.base import GraphContext, StaticSizes, fake_value
from cggr_compile.passes.semantic.make_sizes_static import has_symbolic_sizes
from cggr_compile.pipeline import copy_module, rewrite
from cggr_compile.registry import registry
from cggr_compile.replay import Replay
from cggr_compile.report import GraphDump, GraphReport, Verification
from cggr_compile.runtime import Runtime
from cggr_compile.runtime import reset as reset_runtimes
from cggr_compile.runtime_resolver import RuntimeResolver
from cggr_compile.schedule import round_up, rungs
from cggr_compile.variance import Gradient, VarianceMeter
from cggr_compile.verify import Verifier, unverifiable

log = logging.getLogger(__name__)

# The gathers of all layers read the selected positions. Only those of one layer are worth fusing, a dozen; to try each
# with each takes Inductor longer, the more layers there are.
NEIGHBOURS = 16


def cggr(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one captured graph; ``torch.compile(model, backend="cggr", options=..., mode=...)`` calls this.

    A training step of a language model is rewritten to back-propagate from selected tokens only; any other graph
    goes to the compiler as it is. ``options``: see :class:`cggr_compile.Options`. ``mode``: as Inductor's.

    The returned function raises ValueError at its first call for an unusable option: an exception raised here
    would reach the user wrapped by Dynamo.
    """
    try:
        with compat.no_saved_tensors_hooks():
            return _compile(gm, list(example_inputs), Options.parse(options), mode)
    except OptionError as error:
        return _raiser(error)


def _reset() -> None:
    """``torch._dynamo.reset()``: CUDA graphs outlive the compiled code they belong to, and so does what was told."""
    compat.reset_cuda_graphs()
    reset_runtimes()


cggr.reset = _reset  # type: ignore[attr-defined]


def _raiser(error: ValueError) -> Callable[..., Any]:
    def raise_it(*_args: Any) -> Any:
        raise type(error)(*error.args)

    return raise_it


def _compile(gm: GraphModule, inputs: list[Any], options: Options, mode: str | None) -> Callable[..., Any]:
    modes = compat.inductor_modes()
    if mode is not None and mode not in modes:
        raise OptionError(f"mode must be one of {sorted(modes)}, got {mode!r}")
    patches = {**modes[mode or "default"], **options.inductor}
    if options.cuda_graphs:
        patches[compat.CUDA_GRAPHS] = True
    unknown = sorted(set(patches) - compat.inductor_option_names())
    if unknown:
        raise OptionError(f"inductor: unknown Inductor settings {unknown}")
    resolver = RuntimeResolver(gm, inputs)
    runtime = resolver.runtime
    engine = _engine(options, inputs)
    if engine != "eager":
        lowerings.register()
    if patches.get(compat.CUDA_GRAPHS) and engine != "Inductor CUDA":
        runtime.notify(f"CUDA graphs do nothing here: the compiler is {engine}")
        patches[compat.CUDA_GRAPHS] = False
    training, refusal = _is_training(gm, inputs)
    launches = engine == "Inductor CUDA" and not patches.get(compat.CUDA_GRAPHS)
    ratios = rungs(options) if training else (1.0,)

    def rewritten(ratio: float) -> _Form:
        report = GraphReport(
            index=sum(r.training == training for r in runtime.reports),
            training=training,
            compiler=engine,
            options=options.as_dict(),
            reason=Cause.NOT_TRAINING.says(),
        )
        if refusal is not None:
            report.refuse(*refusal)
        dump = GraphDump(options.dump_dir or os.environ.get("CGGR_DUMP_DIR") or None, report)
        at_ratio = dataclasses.replace(options, min_tokens_ratio=ratio)
        ctx = GraphContext(at_ratio, list(inputs), compat.capture_fake_mode(gm), launches, rung=len(ratios) > 1)
        dump.stage("captured", gm)
        work = rewrite(gm, ctx, report, dump) if report.training and refusal is None else gm
        resolver.begin(report, options)
        captured = CapturedReference(gm, work, inputs, ctx) if options.verify and report.matched else None
        static = ctx.static if work is not gm else None
        return _Form(work, ctx, static, report, dump, resolver, patches, captured=captured)

    form = rewritten(ratios[-1])  # the smallest: where that cannot be done, nothing below 1.0 can
    report, ctx = form.report, form.ctx
    for notice in ctx.notices if report.matched else ():
        runtime.notify(notice)
    for warning in ctx.warnings if report.matched else ():
        runtime.warn(warning)
    if report.matched or (not training and at_compiled_call()):
        trained = [weakref.ref(t) for t in inputs if isinstance(t, Tensor) and t.requires_grad]
        recompile_limit.watch(partial(_given_up, weakref.ref(runtime), trained, options))
    if report.training and not report.matched:
        find_cause(gm, report)
        if not ctx.dense:
            runtime.fall_back(report)
        if options.verify:
            _nothing_to_verify(runtime, report, f"the graph is not rewritten: {report.reason}")
    if not report.matched or len(ratios) == 1:
        _pin_sizes(form)
        return resolver.before(_at_capture(form, inputs).run)
    forms = {**{ratio: rewritten(ratio) for ratio in ratios[:-1]}, ratios[-1]: form}
    return resolver.before(_ladder(forms, inputs, options))


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


@dataclass
class _Form:
    """A captured graph as the semantic passes left it, for one ratio.

    ``static`` if its sizes are numbers now, ``measured`` if its gradient is compared with another ratio's,
    ``captured`` if it is to be verified.
    """

    graph: GraphModule
    ctx: GraphContext
    static: StaticSizes | None
    report: GraphReport
    dump: GraphDump
    resolver: RuntimeResolver
    patches: dict[str, Any]
    measured: bool = False
    captured: CapturedReference | None = None


def _ladder(forms: dict[float, _Form], inputs: list[Any], options: Options) -> Callable[..., Any]:
    """The function that runs each step at the ratio its schedule wants. Only what the first one needs is compiled now.

    A graph whose sizes stay symbolic is compiled now as well: it puts guards on them, which Dynamo collects here.
    """
    measuring = options.min_tokens_ratio == "auto"
    for form in forms.values():
        _pin_sizes(form)
        form.measured = measuring
    resolver = next(iter(forms.values())).resolver
    first = round_up(resolver.runtime.ratio(options), tuple(forms))
    compiled = {first: _at_capture(forms[first], inputs)}
    waiting = {}
    compilation = compat.compilation_id()
    for ratio, form in forms.items():
        if ratio == first:
            continue
        if form.static is None and has_symbolic_sizes(form.graph):
            with compat.separate_tracing_context():
                compiled[ratio] = _at_capture(form, inputs)
        else:
            form.report.waiting = True
            form.dump.finish()
            form.ctx.example_inputs = []  # the model's parameters and a batch: not to be kept alive
            waiting[ratio] = partial(_after_capture, form, compilation)
    measure = _measuring(options, resolver) if measuring else None
    return Ladder(compiled, waiting, lambda: resolver.call.ratio(options), measure).run


def _measuring(options: Options, resolver: RuntimeResolver) -> Callable[[Ladder, float, Sequence[Any]], None]:
    """What measures, before some steps, the error that the selection adds to the gradient."""
    meters: WeakKeyDictionary[Runtime, VarianceMeter] = WeakKeyDictionary()  # batches of two models are not compared

    def measure(ladder: Ladder, ratio: float, args: Sequence[Any]) -> None:
        below = next(r for r in ladder.ratios if r < 1.0)
        at = min(ratio, below)  # the dense graph has no selection: the one to go to next

        def gradients() -> tuple[Gradient, Gradient]:
            dense, selected = ladder.rung(1.0, args).gradient, ladder.rung(at, args).gradient
            assert dense is not None and selected is not None
            return dense, selected

        meter = meters.setdefault(resolver.runtime, VarianceMeter(options.measure_every))
        resolver.call.measure(meter, args, at, gradients)

    return measure


def _pin_sizes(form: _Form) -> None:
    for size in form.static.sizes if form.static is not None else ():
        compat.pin_size(size)


def _at_capture(form: _Form, inputs: Sequence[Any]) -> Rung:
    """Compile a form while Dynamo captures it."""
    if form.static is None:
        return _compiled(form, inputs)
    with compat.tracing_under(form.ctx.fake_mode):
        return _compiled(form, inputs)


def _after_capture(form: _Form, compilation: Any, inputs: Sequence[Any]) -> Rung:
    """Compile a form at the first step that needs it."""
    fake_mode = form.ctx.fake_mode if form.static is not None else None
    with compat.compiling_later(compilation, fake_mode), compat.no_saved_tensors_hooks():
        return _compiled(form, inputs)


def _compiled(form: _Form, inputs: Sequence[Any]) -> Rung:
    kept = form.static.kept if form.static is not None else tuple(range(len(inputs)))
    log.info("graph %d compiled by %s: %s", form.report.index, form.report.compiler, form.report.reason)
    rung = (_selective if form.report.matched else _dense)(form, [inputs[i] for i in kept])
    form.report.waiting = False
    form.dump.finish()
    if form.static is None:
        return rung
    run, gradient = rung.run, rung.gradient
    return Rung(
        lambda *args: run(*(args[i] for i in kept)),
        None if gradient is None else lambda args: gradient([args[i] for i in kept]),
    )


def _engine(options: Options, inputs: list[Any]) -> str:
    """Which compiler lowers the graph; ``doctor`` explains the choice."""
    device = next((t.device.type for t in inputs if isinstance(t, Tensor)), "cpu")
    usable = compat.has_triton() if device == "cuda" else compat.cpp_compiler() is not None and device == "cpu"
    if options.compiler == "eager" or (options.compiler == "auto" and not usable):
        return "eager"
    return "Inductor CUDA" if device == "cuda" else "Inductor CPU"


def _is_training(gm: GraphModule, inputs: list[Any]) -> tuple[bool, tuple[Cause, str] | None]:
    """Whether the graph is a training step's, and why it cannot be rewritten where that is known beforehand."""
    trained = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    if not torch.is_grad_enabled() or not any(t.dim() or isinstance(t, Parameter) for t in trained):
        return False, None  # numbers that are no parameters: what is done with a loss
    results = (fake_value(node) for node in gm.graph.output_node().all_input_nodes)
    if not any(isinstance(t, Tensor) and t.requires_grad for t in results):
        return False, None  # an optimizer's update, say
    scopes = compat.frame_scopes()
    paths = {path for node in gm.graph.nodes for path, _ in node.meta.get("nn_module_stack", {}).values()}
    modules = [m for path in paths if (m := compat.module_at(path, scopes)) is not None]
    if paths and not modules:
        return True, (Cause.UNKNOWN_MODE, Cause.UNKNOWN_MODE.says(module=min(paths)))
    # a frozen part may be in evaluation mode; a functional model has no mode at all
    training = not modules or any(m.training for m in modules)
    for path in _deciding(paths, scopes):
        compat.guard_mode(path)
    piece = compat.in_ddp_piece(sys._getframe())  # it may look whole
    return training, (Cause.DDP_PIECE, Cause.DDP_PIECE.says()) if training and piece else None


def _deciding(paths: set[str], scopes: dict[str, dict[str, Any]]) -> set[str]:
    """The modules whose mode tells a training step: the outermost ones, and one inside that trains where none does."""
    found = {outer for path in paths if (outer := compat.outermost_module(path, scopes)) is not None}
    if any(compat.module_at(path, scopes).training for path in found):  # type: ignore[union-attr]
        return found
    inner = (path for path in sorted(paths) if (m := compat.module_at(path, scopes)) is not None and m.training)
    return found | set(itertools.islice(inner, 1))


def _lower(gm: GraphModule, inputs: list[Any], engine: str, patches: dict[str, Any]) -> Callable[..., Any]:
    if engine == "eager":
        return gm.forward
    if holds_our_operators(gm):  # a layer of ours, or lowered experts: the cache key must know our sources
        patches = {**patches, "joint_custom_pre_pass": source_key()}
    return compat.compile_fx(gm, inputs, patches)


def _dense(form: _Form, inputs: list[Any]) -> Rung:
    """Compile a graph that trains on every position, or does not train."""
    ctx, resolver, report, patches = form.ctx, form.resolver, form.report, form.patches
    observed, rung = ctx.observed is not None, ctx.rung
    aside = _aside(form, inputs)
    compiled = _lower(form.graph, inputs, report.compiler, patches)
    if not report.training:
        return Rung(compiled)  # not noted as the last graph that ran
    replayed = _replayed(report, patches)

    def run(*args: Any) -> Any:
        if rung:
            resolver.call.advance()
        outputs, stats = compiled(*args), None
        if observed:
            *outputs, stats = outputs
            stats = stats.clone() if replayed else stats
        resolver.call.record(report, None, None, stats)
        return tuple(outputs)

    return Rung(run, None if aside is None else lambda args: aside.gradient(compiled, args))


def _aside(form: _Form, inputs: Sequence[Any]) -> Aside | None:
    """For graphs whose gradient is measured. To be made before the graph is compiled, which may change it."""
    if not form.measured:
        return None
    device = next(t.device for t in inputs if isinstance(t, Tensor) and t.requires_grad)
    return Aside(form.graph, device, form.ctx.outputs.objective)


def _replayed(report: GraphReport, patches: dict[str, Any]) -> bool:
    """Whether the next step overwrites what this one returns."""
    return report.compiler == "Inductor CUDA" and compat.uses_cuda_graphs(patches)


def _selective(form: _Form, inputs: list[Any]) -> Rung:
    """Compile a graph that trains on selected positions."""
    gm, ctx, resolver = form.graph, form.ctx, form.resolver
    report, patches = form.report, form.patches
    assert ctx.selection is not None and ctx.loss is not None and ctx.stack is not None
    device = ctx.loss.target.meta["example_value"].device
    example = [*inputs, torch.zeros(2, dtype=torch.int64, device=device)]
    semantic = copy_module(gm) if ctx.options.verify else gm  # a compiler may change the graph it gets
    aside = _aside(form, inputs)
    replayed = _replayed(report, patches)
    ours = replayed and not any(written_inputs(gm))  # else Inductor's CUDA graphs, which see to what is written
    if ours:
        patches = {**patches, compat.CUDA_GRAPHS: False}
    with pass_records.kept(gm, example, ctx.options, report):
        compiled = _lower_selective(gm, example, ctx.options, report, form.dump, patches)
    if ours:
        parameters = [i for i, value in enumerate(inputs) if isinstance(value, Parameter)]
        compiled = Replay(
            compiled, parameters, device, lambda: resolver.runtime, lambda why: resolver.runtime.notify(why)
        )
    if message := dense_layers(report, ctx.stack.blocks, ctx.outputs.dense_blocks):
        resolver.runtime.warn(message)
    verifier = _verifier(compiled, semantic, example, ctx.options, resolver.runtime, report, patches, form.captured)
    form.captured = None  # the verifier's, for one step

    def run(*args: Any) -> Any:
        nonlocal verifier
        call = resolver.call
        if (checking := verifier) is not None and not call.repeats:
            if checking.remaining <= 1:
                verifier = None  # and with it, after this step, the dense backward
            checking.step(args, call.runtime, report)
        del checking
        *outputs, weights, selected, stats = compiled(*args, call.state(device))
        if replayed:
            weights, selected, stats = weights.clone(), selected.clone(), stats.clone()
        call.record(report, selected, weights, stats)
        return tuple(outputs)

    if aside is None:
        return Rung(run)
    return Rung(run, lambda args: aside.gradient(compiled, args, resolver.runtime.other_state(device)))


def _lower_selective(
    gm: GraphModule,
    example: list[Any],
    options: Options,
    report: GraphReport,
    dump: GraphDump,
    patches: dict[str, Any],
) -> Callable[..., Any]:
    """Compile a rewritten graph, with the optimising passes."""
    if report.compiler == "eager":
        return compat.aot_eager(gm, example, partition_with_passes(report, dump))
    passes = {"joint_custom_pre_pass": joint_pre_pass(options, report, dump)}
    return compat.compile_fx(gm, example, {**compat.fusion_limit(NEIGHBOURS), **patches, **passes})


def _verifier(
    compiled: Callable[..., Any],
    semantic: GraphModule,
    example: list[Any],
    options: Options,
    runtime: Runtime,
    report: GraphReport,
    patches: dict[str, Any],
    captured: CapturedReference | None,
) -> Verifier | None:
    """What the option ``verify`` asks for: the same graph once more, with a dense backward."""
    if not options.verify:
        return None
    device = example[-1].device
    if why := unverifiable(report, device):
        _nothing_to_verify(runtime, report, why)
        return None
    options = dataclasses.replace(options, row_sparse=False)
    dense = dataclasses.replace(report, options=options.as_dict(), passes=[])
    patches = {**patches, compat.CUDA_GRAPHS: False}  # it runs a few times only
    with compat.separate_tracing_context():
        reference = _lower_selective(copy_module(semantic), example, options, dense, GraphDump(None, dense), patches)
    return Verifier(compiled, reference, semantic, device, options.verify, captured)


def _nothing_to_verify(runtime: Runtime, report: GraphReport, why: str) -> None:
    report.verification = Verification(note=why)
    runtime.notify(f"verify: nothing to compare: {why}")
