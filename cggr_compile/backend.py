"""The ``torch.compile`` backend ``"cggr"``."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from cggr_compile import compat
from cggr_compile.dense_layers import dense_layers
from cggr_compile.joint import joint_pre_pass, partition_with_passes
from cggr_compile.options import OptionError, Options
from cggr_compile.passes.base import GraphContext, fake_value
from cggr_compile.pipeline import copy_module, note_cached, rewrite
from cggr_compile.report import GraphDump, GraphReport, Verification
from cggr_compile.runtime import Runtime, runtime_of
from cggr_compile.verify import Verifier, unverifiable

log = logging.getLogger(__name__)


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
        return _compile(gm, list(example_inputs), Options.parse(options), mode)
    except OptionError as error:
        return _raiser(error)


def _reset() -> None:
    """``torch._dynamo.reset()``: only CUDA graphs outlive the compiled code they belong to."""
    compat.reset_cuda_graphs()


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
    runtime = runtime_of(t for t in inputs if isinstance(t, Tensor) and t.requires_grad)
    engine = _engine(options, inputs)
    if patches.get(compat.CUDA_GRAPHS) and engine != "Inductor CUDA":
        runtime.notify(f"CUDA graphs do nothing here: the compiler is {engine}")
        patches[compat.CUDA_GRAPHS] = False
    training = _is_training(gm, inputs)
    report = GraphReport(
        index=sum(r.training == training for r in runtime.reports),
        training=training,
        compiler=engine,
        options=options.as_dict(),
        reason="not a training graph: gradients are off or the model is in evaluation mode",
    )
    dump = GraphDump(options.dump_dir or os.environ.get("CGGR_DUMP_DIR") or None, report)
    launches = engine == "Inductor CUDA" and not patches.get(compat.CUDA_GRAPHS)
    ctx = GraphContext(options, inputs, compat.capture_fake_mode(gm), pays_launches=launches)
    dump.stage("captured", gm)
    work = rewrite(gm, ctx, report, dump) if report.training else gm
    runtime.begin(report, options)
    log.info("graph %d compiled by %s: %s", report.index, engine, report.reason)
    for notice in ctx.notices if report.matched else ():
        runtime.notify(notice)
    if report.training and not report.matched and not ctx.dense:
        runtime.fall_back(report)
    dump.finish()
    if not report.matched:
        if options.verify and report.training:
            _nothing_to_verify(runtime, report, f"the graph is not rewritten: {report.reason}")
        return _remember(_lower(work, inputs, engine, patches), runtime, report)
    if ctx.static is None:
        return _selective(work, inputs, ctx, runtime, report, dump, patches)
    for size in ctx.static.sizes:
        compat.pin_size(size)
    with compat.tracing_under(ctx.fake_mode):
        run = _selective(work, ctx.example_inputs, ctx, runtime, report, dump, patches)
    kept = ctx.static.kept
    return lambda *args: run(*(args[i] for i in kept))


def _engine(options: Options, inputs: list[Any]) -> str:
    """Which compiler lowers the graph; ``doctor`` explains the choice."""
    device = next((t.device.type for t in inputs if isinstance(t, Tensor)), "cpu")
    usable = compat.has_triton() if device == "cuda" else compat.cpp_compiler() is not None and device == "cpu"
    if options.compiler == "eager" or (options.compiler == "auto" and not usable):
        return "eager"
    return "Inductor CUDA" if device == "cuda" else "Inductor CPU"


def _is_training(gm: GraphModule, inputs: list[Any]) -> bool:
    if not torch.is_grad_enabled() or not any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        return False
    results = (fake_value(node) for node in gm.graph.output_node().all_input_nodes)
    if not any(isinstance(t, Tensor) and t.requires_grad for t in results):
        return False  # an optimizer's update, say
    scopes = compat.frame_scopes()
    paths = {path for node in gm.graph.nodes for path, _ in node.meta.get("nn_module_stack", {}).values()}
    modules = [m for path in paths if (m := compat.module_at(path, scopes)) is not None]
    # a frozen part may be in evaluation mode; a functional model has no mode at all
    return not modules or any(m.training for m in modules)


def _lower(gm: GraphModule, inputs: list[Any], engine: str, patches: dict[str, Any]) -> Callable[..., Any]:
    if engine == "eager":
        return gm.forward
    return compat.compile_fx(gm, inputs, patches)


def _remember(compiled: Callable[..., Any], runtime: Runtime, report: GraphReport) -> Callable[..., Any]:
    """Note at each call which graph ran last; inference graphs are not noted."""
    if not report.training:
        return compiled

    def run(*args: Any) -> Any:
        runtime.record(report, None, None, None)
        return compiled(*args)

    return run


def _selective(
    gm: GraphModule,
    inputs: list[Any],
    ctx: GraphContext,
    runtime: Runtime,
    report: GraphReport,
    dump: GraphDump,
    patches: dict[str, Any],
) -> Callable[..., Any]:
    assert ctx.selection is not None and ctx.loss is not None and ctx.stack is not None
    device = ctx.loss.target.meta["example_value"].device
    example = [*inputs, torch.zeros(2, dtype=torch.int64, device=device)]
    semantic = copy_module(gm) if ctx.options.verify else gm  # a compiler may change the graph it gets
    compiled = _lower_selective(gm, example, ctx.options, report, dump, patches)
    note_cached(report)
    if message := dense_layers(report, ctx.stack.blocks):
        runtime.warn(message)
    verifier = _verifier(compiled, semantic, example, ctx.options, runtime, report, patches)
    replayed = report.compiler == "Inductor CUDA" and compat.uses_cuda_graphs(patches)
    dump.finish()
    check = _label_check(gm, ctx)
    check(inputs)

    def run(*args: Any) -> Any:
        nonlocal verifier
        if _checks_labels_every_step(device):
            check(args)
        if (checking := verifier) is not None:
            if checking.remaining <= 1:
                verifier = None  # and with it, after this step, the dense backward
            checking.step(args, runtime, report)
            del checking
        *outputs, weights, selected, stats = compiled(*args, runtime.next_state(device))
        if replayed:  # the next replay overwrites what this one returned
            weights, selected, stats = weights.clone(), selected.clone(), stats.clone()
        runtime.record(report, selected, weights, stats)
        return tuple(outputs)

    return run


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
    return compat.compile_fx(gm, example, {**patches, "joint_custom_pre_pass": joint_pre_pass(options, report, dump)})


def _verifier(
    compiled: Callable[..., Any],
    semantic: GraphModule,
    example: list[Any],
    options: Options,
    runtime: Runtime,
    report: GraphReport,
    patches: dict[str, Any],
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
    return Verifier(compiled, reference, semantic, device, options.verify)


def _nothing_to_verify(runtime: Runtime, report: GraphReport, why: str) -> None:
    report.verification = Verification(note=why)
    runtime.notify(f"verify: nothing to compare: {why}")


def _checks_labels_every_step(device: torch.device) -> bool:
    """On an accelerator looking at the labels would wait for the device; there the loss itself asserts."""
    return device.type == "cpu"


def _label_check(gm: GraphModule, ctx: GraphContext) -> Callable[[Sequence[Any]], None]:
    loss = ctx.loss
    assert loss is not None
    if loss.labels is None or not isinstance(loss.vocab, int):
        return lambda args: None
    position = [str(n) for n in gm.graph.find_nodes(op="placeholder")].index(str(loss.labels))
    vocab, ignored = loss.vocab, loss.ignore_index

    def check(args: Sequence[Any]) -> None:
        labels = args[position]
        wrong = (labels != ignored) & ((labels < 0) | (labels >= vocab))
        if bool(wrong.any()):
            raise OptionError(f"labels must be in [0, {vocab}) or {ignored} (ignored), got {int(labels[wrong][0])}")

    return check
