"""Every torch-version branch and private import of the project (tested on torch 2.11 and 2.13)."""

from __future__ import annotations

import copy
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from traceback import FrameSummary
from types import CodeType, FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx import GraphModule, Node

from cggr_compile.scoped_patch import ScopedPatch


def capture_fake_mode(gm: GraphModule) -> Any:
    """The FakeTensorMode that made a Dynamo graph's example values (not the one its backend traces under)."""
    from torch._subclasses.fake_tensor import FakeTensor

    values = (node.meta.get("example_value") for node in gm.graph.nodes)
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


# metadata of a checkpoint's body: the context_fn of selective activation checkpointing
CHECKPOINT_CONTEXT = "_checkpoint_context_fn"


def next_checkpoint_id() -> int:
    """An ``ac_graph_id``: they grow in the order of the graph, and no two checkpoints of a process share one."""
    from torch._higher_order_ops.wrap import uid

    return next(uid)


def enters_or_leaves_vmap(node: Node) -> bool:
    """Whether a call opens or closes a level of ``torch.vmap``, on which the calls in between rely without using it."""
    target: Any = node.target
    return node.op == "call_function" and getattr(target, "__module__", "") == "torch._functorch.predispatch"


# what a Dynamo graph calls to change the state that its later nodes run in
SET_GRAD = torch._C._set_grad_enabled
ENTER_AUTOCAST, EXIT_AUTOCAST = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
ENTER_INFERENCE = torch.autograd.grad_mode._enter_inference_mode
EXIT_INFERENCE = torch.autograd.grad_mode._exit_inference_mode


@contextmanager
def modes_kept() -> Iterator[None]:
    """Around nodes of a graph that are run: what they change and do not undo, as after an exception, is undone.

    Grad mode, autocast, and levels of ``torch.vmap``; not inference mode, which ends with the object that began it.
    """
    from torch._C._functorch import _vmap_decrement_nesting, get_dynamic_layer_stack_depth

    depth = get_dynamic_layer_stack_depth()
    with ExitStack() as state:
        state.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        for kind in ("cpu", "cuda"):
            enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            state.enter_context(torch.autocast(kind, dtype, enabled=enabled))
        try:
            yield
        finally:
            while get_dynamic_layer_stack_depth() > depth:
                _vmap_decrement_nesting()


def symbols(value: Any) -> set[Any]:
    """The symbols of a size; none for a number."""
    return set(value.node.expr.free_symbols) if isinstance(value, torch.SymInt) else set()


def depends_on_data(value: Any) -> bool:
    """Whether a size or number is known only when the graph runs."""
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) and not value.node.has_hint()


def hint(value: Any) -> int:
    """What a size is at the call that is being captured, without a guard."""
    return int(value.node.hint) if isinstance(value, torch.SymInt) else int(value)


def pin_size(value: Any) -> None:
    """Add the guard that a symbolic size has the value it has in this capture."""
    int(value)


def marked_dynamic(tensor: torch.Tensor) -> bool:
    """Whether the user demanded symbolic sizes (``mark_dynamic``, ``mark_unbacked``); Dynamo then refuses guards."""
    names = ("_dynamo_dynamic_indices", "_dynamo_unbacked_indices", "_dynamo_strict_unbacked_indices")
    return any(getattr(tensor, name, None) for name in names)


def multiplies_in_tf32() -> bool:
    """Whether float32 matrix products on CUDA are allowed to use TF32, by whichever of torch's settings."""
    return str(torch.backends.cuda.matmul.fp32_precision) == "tf32"


def symbolic_sizes_kept(fake_mode: Any) -> Any:
    """Around operations on fake tensors: the C++ forms of some (``linear``, in torch 2.11) turn sizes into numbers."""
    from torch._dispatch.python import enable_python_dispatcher

    symbolic = fake_mode.shape_env is not None and fake_mode.shape_env.var_to_range
    return enable_python_dispatcher() if symbolic else nullcontext()


def is_fake(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def static_fake_mode() -> Any:
    """A FakeTensorMode whose tensors have numbers for sizes."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Inductor's cache asks for a shape environment
    mode = FakeTensorMode(shape_env=ShapeEnv(assume_static_by_default=True), static_shapes=True)
    convert = mode.from_tensor

    def from_tensor(tensor: Any, **arguments: Any) -> Any:
        # AOTAutograd asks for symbolic sizes where there is a shape environment
        arguments.pop("symbolic_context", None)
        return convert(tensor, **{**arguments, "static_shapes": True})

    mode.from_tensor = from_tensor  # type: ignore[method-assign]  # higher-order operators know no subclass of it
    return mode


def traced(function: Callable[..., Any], arguments: Sequence[Any], fake_mode: Any) -> GraphModule:
    """The ATen calls that a function of (fake) tensors makes, decomposed as Inductor does it."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    with fake_mode, torch.no_grad():
        return make_fx(function, decomposition_table=select_decomp_table())(*arguments)


@contextmanager
def tracing_under(fake_mode: Any) -> Iterator[None]:
    """Compile with this fake mode in place of the capture's; AOTAutograd's guards still reach Dynamo."""
    from torch._guards import TracingContext, tracing

    outer, inner = TracingContext.try_get(), TracingContext(fake_mode)
    with tracing(inner):
        yield
    if outer is not None:
        outer.guards_context.aotautograd_guards.extend(inner.guards_context.aotautograd_guards)


def compilation_id() -> Any:
    """What logs call the compilation under way: hand it to :func:`compiling_later`."""
    from torch._guards import CompileContext

    return CompileContext.try_get()


@contextmanager
def compiling_later(compilation: Any, fake_mode: Any = None) -> Iterator[None]:
    """Compile a captured graph when Dynamo is no longer there, with static sizes.

    Guards are not collected: they must be those of a form of the graph that was compiled at the capture.

    Args:
        compilation: what :func:`compilation_id` gave at the capture. fake_mode: a :func:`static_fake_mode`.
    """
    from torch._guards import TracingContext, compile_context, tracing

    with compile_context(compilation), tracing(TracingContext(fake_mode or static_fake_mode())):
        yield


def _translator() -> Any:
    """Dynamo's translator of the frame that it is compiling; None outside a capture."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx()
    except AttributeError:  # the thread-local is unset outside a capture (2.13; 2.11 returns None)
        return None


def recompilations_left() -> int | None:
    """How many more graphs Dynamo compiles for the frame it is capturing, this one included; None outside."""
    from torch._dynamo import config
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    code = captured_code()
    return None if code is None else int(config.recompile_limit) - len(_debug_get_cache_entry_list(code))


@dataclass(frozen=True)
class Compilation:
    """An attempt of Dynamo's to compile a frame.

    Attributes:
        code, scope: the frame's, and its locals.
        limit, value: the setting of ``torch._dynamo.config`` that forbids it, and its value; None if none does.
    """

    code: CodeType
    scope: dict[str, Any]
    limit: str | None
    value: int | None


def before_every_compilation(hook: Callable[[], str]) -> None:
    """Let Dynamo call ``hook`` before it compiles a frame, or decides that it has done so too often.

    What the hook raises reaches the user's call. It returns a text for Dynamo's records.
    """
    from torch._dynamo.utils import get_hook_for_recompile_user_context, register_hook_for_recompile_user_context

    if hook not in (get_hook_for_recompile_user_context() or ()):
        register_hook_for_recompile_user_context(hook)


def compilation() -> Compilation | None:
    """In a hook of :func:`before_every_compilation`: what Dynamo is about to compile."""
    from torch._dynamo import config
    from torch._dynamo.cache_size import exceeds_recompile_limit

    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_frame_of(frame, "convert_frame.py", "_compile"):
        frame = frame.f_back
    if frame is None:
        return None
    known = frame.f_locals
    exceeded, limit = exceeds_recompile_limit(known["cache_size"], known["compile_id"])
    value = int(getattr(config, limit)) if exceeded else None
    return Compilation(known["code"], known["locals"], limit if exceeded else None, value)


def _is_frame_of(frame: FrameType, file: str, *functions: str) -> bool:
    """Whether a frame runs one of these functions of a file of Dynamo's."""
    code = frame.f_code
    return code.co_name in functions and Path(code.co_filename).parts[-3:] == ("torch", "_dynamo", file)


def is_compiled_call(frame: FrameType) -> bool:
    """Whether a frame is the call of something that ``torch.compile`` returned (or ``Module.compile`` made)."""
    return _is_frame_of(frame, "eval_frame.py", "compile_wrapper")


def below_dynamo(frame: FrameType | None) -> FrameType | None:
    """The frame that called the one under capture, seen from a backend; None outside a capture."""
    found = None
    while frame is not None and not is_compiled_call(frame):
        if _is_frame_of(frame, "convert_frame.py", "__call__"):
            found = frame
        elif found is not None:
            break
        frame = frame.f_back
    return None if found is None else found.f_back


def in_ddp_piece(frame: FrameType | None) -> bool:
    """Whether a backend, called from ``frame``, gets a part of a graph that Dynamo cut for DistributedDataParallel."""
    while frame is not None:
        if frame.f_code.co_name == "compile_submod" and frame.f_code.co_filename.endswith("distributed.py"):
            return True
        frame = frame.f_back
    return False


@dataclass(frozen=True)
class GraphBreak:
    """A graph break: Dynamo's reason, and where, from the captured frame inwards (at least one place)."""

    reason: str
    stack: tuple[FrameSummary, ...]


def graph_breaks() -> list[GraphBreak]:
    """Those since the last ``torch._dynamo.reset()``, oldest first; a function that is skipped whole leaves none."""
    from torch._dynamo.utils import graph_break_reasons

    # "step_unsupported" is where, outside of the function that broke, the graph ended
    return [found for r in graph_break_reasons if r.reason != "step_unsupported" and (found := _graph_break(r))]


def break_at_end() -> GraphBreak | None:
    """The break that ends the graph under compilation, if one does."""
    tx = _translator()
    reason = None if tx is None else tx.output.compile_subgraph_reason
    return None if reason is None or not reason.graph_break else _graph_break(reason)


def _graph_break(reason: Any) -> GraphBreak | None:
    return GraphBreak(reason.reason, tuple(reason.user_stack)) if reason.user_stack else None


def resumed_at(code: CodeType) -> int | None:
    """The line of its file at which a frame goes on after a graph break; None for the code of a whole function."""
    found = re.match(r"torch_dynamo_resume_in_.*_at_(\d+)", code.co_name)
    return int(found[1]) if found else None


def frame_scopes() -> dict[str, dict[str, Any]]:
    """Locals (L) and globals (G) of the frame that Dynamo is compiling; empty outside a capture."""
    tx = _translator()
    return {} if tx is None else {"L": tx.f_locals, "G": tx.f_globals}


def captured_code() -> CodeType | None:
    """The code that Dynamo is compiling; None outside a capture. What it makes of that has the same name and place."""
    tx = _translator()
    return None if tx is None else tx.f_code


_EVAL_FRAME = "compile_wrapper"  # the function that torch.compile returns
_MODULE_CALLS = ("_call_impl", "_wrapped_call_impl")


@dataclass(frozen=True)
class Caller:
    """Who runs a compiled graph.

    Attributes:
        module: what was given to ``torch.compile``, if that is a module or a method of one; else the outermost module
            that is called under it, which a graph break may have left in pieces; None if there is none.
        captured: the frame that Dynamo captured, running; None at the capture itself.
    """

    module: torch.nn.Module | None
    captured: FrameType | None

    @property
    def scopes(self) -> dict[str, dict[str, Any]]:
        """Locals (L) and globals (G) of the captured frame."""
        if self.captured is None:
            return frame_scopes()
        return {"L": self.captured.f_locals, "G": self.captured.f_globals}


def caller(code: CodeType | None) -> Caller:
    """Who runs the graph that was captured in a frame with this code, read off the stack of Python frames."""
    wrappers, calls = _landmarks()
    captured = called = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if name == _EVAL_FRAME and file == wrappers:
            break
        if name in _MODULE_CALLS and file == calls:
            called = frame
        elif captured is None and code is not None and name == code.co_name and file == code.co_filename:
            captured = frame if frame.f_code.co_firstlineno == code.co_firstlineno else None
        frame = frame.f_back
    if frame is None:  # no torch.compile: the modules further out are anybody's
        return Caller(None, captured)
    module = _module_of(frame.f_locals.get("fn"))
    if module is None and called is not None:
        module = called.f_locals.get("self")
    return Caller(module, captured)


@functools.cache
def _landmarks() -> tuple[str, str]:
    """The files of the function that ``torch.compile`` returns and of a module's call."""
    from torch._dynamo.eval_frame import _TorchDynamoContext

    return _TorchDynamoContext.__call__.__code__.co_filename, torch.nn.Module._call_impl.__code__.co_filename


def _module_of(function: Any) -> torch.nn.Module | None:
    """The module that a function is, or is a method of; Dynamo wraps some functions in another."""
    while function is not None:
        owner = function if isinstance(function, torch.nn.Module) else getattr(function, "__self__", None)
        if isinstance(owner, torch.nn.Module):
            return original_module(owner)
        function = getattr(function, "__wrapped__", None)
    return None


def original_module(module: torch.nn.Module) -> torch.nn.Module:
    """What ``torch.compile(module)`` was given, or the module itself."""
    from torch._dynamo.eval_frame import OptimizedModule

    while isinstance(module, OptimizedModule):
        module = module._orig_mod
    return module


def module_at(path: str, scopes: dict[str, dict[str, Any]]) -> torch.nn.Module | None:
    """The module that an ``nn_module_stack`` path names: ``L['self'].model.layers.0``, ``L['args'][0].model``."""
    *_, (_, value) = (None, None), *_along(path, scopes)
    return value if isinstance(value, torch.nn.Module) else None


def outermost_module(path: str, scopes: dict[str, dict[str, Any]]) -> str | None:
    """The shortest beginning of a path (as of :func:`module_at`, or of a source) that is a module's."""
    return next((begin for begin, value in _along(path, scopes) if isinstance(value, torch.nn.Module)), None)


def _along(path: str, scopes: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Every beginning of a path with its value; the whole path with None if it leads nowhere."""
    head, steps = _parsed(path)
    if head is None or head[0] not in scopes:
        return
    value: Any = scopes[head[0]].get(head[1])
    yield f"{head[0]}['{head[1]}']", value
    for end, index, key, name in steps:
        try:
            value = getattr(value, name) if name else value[int(index) if index else key]
        except (AttributeError, LookupError, TypeError):
            yield path, None
            return
        yield path[:end], value


@functools.lru_cache(maxsize=1024)
def _parsed(path: str) -> tuple[tuple[str, str] | None, list[tuple[int, str, str, str]]]:
    """The variable that a path begins with, and its steps: where each ends, its index, key or name."""
    head = re.match(r"([LG])\['([^']+)'\]", path)
    if head is None:
        return None, []
    steps = re.compile(r"\[(\d+)\]|\['([^']+)'\]|([^.\[\]]+)").finditer(path, head.end())
    return (head[1], head[2]), [(step.end(), step[1], step[2], step[3]) for step in steps]


def guard_mode(path: str) -> None:
    """Let the graph under capture hold for the present mode (train or eval) of the module at ``path`` only.

    Dynamo itself guards the mode of modules that read it, such as a dropout. ``path``: as of :func:`module_at`.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource, GetItemSource, GlobalSource, LocalSource, Source

    head, steps = _parsed(path)
    assert head is not None
    source: Source = LocalSource(head[1]) if head[0] == "L" else GlobalSource(head[1])
    for _, index, key, name in steps:
        source = AttrSource(source, name) if name else GetItemSource(source, int(index) if index else key)
    install_guard(AttrSource(source, "training").make_guard(GuardBuilder.CONSTANT_MATCH))


def compile_fx(gm: GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx as inductor_compile_fx

    with _quick_minimum_cuts():
        compiled: Any = inductor_compile_fx(gm, list(inputs), config_patches=config_patches)
    return compiled  # type: ignore[no-any-return]


def _quick_minimum_cuts() -> AbstractContextManager[None]:
    """Let the partitioner cut graphs with Boykov and Kolmogorov's algorithm, a tenth of preflow-push's time or less.

    The cut is the same: networkx takes the one nearest to the sink, whatever flow it found. The partitioner has no
    argument for the algorithm.
    """
    return _minimum_cut_patch()()


@functools.cache
def _minimum_cut_patch() -> ScopedPatch:
    import networkx

    def minimum_cut(usual: Callable[..., Any], graph: Any, source: Any, sink: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = {} if args else {"flow_func": networkx.algorithms.flow.boykov_kolmogorov}
        return usual(graph, source, sink, *args, **{**chosen, **kwargs})

    return ScopedPatch(networkx, "minimum_cut", minimum_cut)


def register_inductor_lowering(op: Any, lower: Callable[..., Any], eager_strides: bool = False) -> None:
    """``eager_strides``: the lowering gets its arguments with the strides that a call of the operator gets."""
    from torch._inductor.lowering import add_layout_constraint, register_lowering, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    constraint = tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True)) if eager_strides else None
    if constraint is not None:
        add_layout_constraint(op, constraint)
    register_lowering(op, type_promotion_kind=None)(lower)


def call_operator(op: Any, *args: Any) -> Any:
    """In a lowering: a call of the operator itself."""
    from torch._inductor.lowering import fallback_handler

    return fallback_handler(op, add_to_fallback_set=False)(*args)


def static_shape(node: Any) -> tuple[int, ...] | None:
    """In a lowering: the sizes of a value; None if one of them is a symbol."""
    return _integers(node.get_size())


def static_strides(node: Any) -> tuple[int, ...]:
    """In a lowering: the strides of what ``realize_fixed_layout`` returned."""
    strides = _integers(node.get_stride())
    assert strides is not None, "static sizes have static strides"
    return strides


def _integers(values: Sequence[Any]) -> tuple[int, ...] | None:
    return tuple(int(v) for v in values) if not any(getattr(v, "free_symbols", None) for v in values) else None


def realize_fixed_layout(node: Any, last_contiguous: bool = False, contiguous: bool = False) -> Any:
    """In a lowering: ``node`` in memory, in the layout it keeps from here on."""
    from torch._inductor import ir

    storage = ir.ExternKernel.realize_input(node)
    ir.as_storage_and_layout(storage, freeze=True)
    if contiguous or (last_contiguous and storage.get_stride()[-1] != 1):
        storage = ir.ExternKernel.require_contiguous(storage)
    return ir.TensorBox(storage.data if isinstance(storage, ir.TensorBox) else storage)


def realized(node: Any) -> Any:
    """In a lowering: ``node`` as a buffer, which the kernel writes that computes it."""
    node.realize()
    return node


def empty_buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """In a lowering: uninitialised memory, contiguous."""
    from torch._inductor.lowering import empty_strided

    return empty_strided(list(shape), None, dtype=dtype, device=device)


def alignment_offset(node: Any) -> int:
    """In a lowering: where ``realize_fixed_layout`` put the first element, in bytes from a multiple of 16."""
    from torch._inductor.virtualized import V

    if node.get_name() in V.graph.unaligned_buffers:
        return 1
    (offset,) = _integers([node.get_layout().offset]) or (1,)
    return offset * int(node.get_dtype().itemsize)


def times_templates(device: torch.device, dtype: torch.dtype) -> bool:
    """In a lowering: whether Inductor is to time Triton templates with outputs of this kind (max-autotune)."""
    try:
        import jinja2  # noqa: F401
        from torch._inductor import config, ir
        from torch._inductor.select_algorithm import TritonTemplate  # noqa: F401
        from torch._inductor.utils import use_triton_template
    except ImportError:
        return False
    if not (config.max_autotune or config.max_autotune_gemm) or config.pipeline_max_autotune_gemm:
        return False  # the pipelined autotuner has no result before scheduling
    return bool(use_triton_template(ir.FixedLayout(device, dtype, [1])))


def triton_template(name: str, grid: Callable[..., tuple[int, int, int]], source: str) -> Any:
    """A template for :func:`autotune`. ``grid``: number of programs, of the output's sizes and the constants."""
    from torch._inductor.select_algorithm import TritonTemplate

    return TritonTemplate(name=name, grid=grid, source=source)


def operator_choice(name: str, op: Any, arrange: Callable[..., tuple[Any, ...]]) -> Any:
    """A call of an operator, for :func:`autotune`. ``arrange``: its arguments, of the tensors and options there."""
    from torch._inductor import ir
    from torch._inductor.select_algorithm import ExternKernelChoice

    def call(*tensors: torch.Tensor, **options: Any) -> Any:
        return op(*arrange(*tensors, **options))

    def generate(*nodes: Any, **options: Any) -> Any:
        return ir.FallbackKernel.create(op, *arrange(*nodes, **options))

    return ExternKernelChoice(call, name=name, has_out_variant=False, kernel_creator=generate)


def autotune(
    name: str,
    tensors: Sequence[Any],
    shape: Sequence[int],
    dtype: torch.dtype,
    operators: Sequence[tuple[Any, dict[str, Any]]],
    template: Any,
    configs: Sequence[dict[str, Any]],
    *,
    written: Sequence[Any] = (),
    examples: dict[int, Callable[[Any], torch.Tensor]] | None = None,
) -> Any:
    """In a lowering: an operator's result, computed in the way that Inductor's autotuner finds fastest.

    Args:
        tensors: nodes that ``realize_fixed_layout`` returned. shape, dtype: of the result, which is contiguous.
        operators: each an :func:`operator_choice` and its options; the first is used if nothing can be timed.
        template, configs: a :func:`triton_template` and its constants, num_warps and num_stages, one choice for each.
        written: those of ``tensors`` that every choice writes to.
        examples: of tensors by their number, values to time the choices with (given the node), where random ones
            will not do.
    """
    from torch._inductor import ir
    from torch._inductor.select_algorithm import autotune_select_algorithm

    layout = ir.FixedLayout(tensors[0].get_device(), dtype, list(shape))
    choices: list[Any] = []
    for operator, options in operators:
        operator.maybe_append_choice(choices, input_nodes=list(tensors), layout=layout, **options)
    more = {"mutated_inputs": list(written)} if written else {}
    for config in configs:
        template.maybe_append_choice(choices, input_nodes=list(tensors), layout=layout, **more, **config)
    # a fused reader would be timed with each choice: there is none for a result that is reduced
    found = autotune_select_algorithm(
        name, choices, list(tensors), layout, input_gen_fns=examples, return_multi_template=False
    )
    return found[0] if isinstance(found, tuple) else found  # 2.13 returns the choice too


def written_side_by_side(parts: Sequence[Any], axis: int) -> Any:
    """In a lowering: one buffer that the kernels of ``parts`` write into, each at its place along ``axis``."""
    from torch._inductor import ir

    return ir.TensorBox(ir.ConcatKernel.create(parts, axis))


def launch(
    kernel: Any, pointers: dict[str, Any], arguments: dict[str, Any], configs: Sequence[tuple[int, Any]]
) -> None:
    """In a lowering: one launch of a Triton kernel, as torch.compile launches the kernels of users.

    Args:
        pointers: nodes by the names of the kernel's parameters. arguments: its other arguments.
        configs: (number of programs, block sizes with num_warps and num_stages); if there are several, they are timed.
    """
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation
    from torch._inductor import config
    from torch._inductor.lowering import lowerings

    configs = configs if config.max_autotune else configs[:1]
    tuned = _tuned(kernel, tuple(tuple(sorted(options.items())) for _, options in configs))
    with _analysed_once():
        lowerings[triton_kernel_wrapper_mutation](
            kernel_idx=kernel_side_table.add_kernel(tuned),
            constant_args_idx=kernel_side_table.add_constant_args(arguments),
            grid=[(programs, 1, 1) for programs, _ in configs],
            tma_descriptor_metadata={},
            kwargs=pointers,
        )


@contextmanager
def _analysed_once() -> Iterator[None]:
    """Look only once per graph for what a kernel writes: Inductor translates the kernel for every launch of it."""
    with ExitStack() as stack:
        for patch in _remembered_analyses():
            stack.enter_context(patch())
        yield


@functools.cache
def _remembered_analyses() -> tuple[ScopedPatch, ...]:
    from torch._higher_order_ops import triton_kernel_wrap as module
    from torch._inductor.virtualized import V

    found: Any = WeakKeyDictionary()  # by the graph that is being lowered

    def remembering(analyse: Callable[..., Any], kernel: Any, arguments: dict[str, Any], *more: Any) -> Any:
        """``analyse``, with its results kept: of tensors only the data types matter."""
        kinds = tuple((name, getattr(value, "dtype", value)) for name, value in arguments.items())
        results = found.setdefault(V.graph, {})
        if (analyse, kernel, kinds) not in results:
            results[analyse, kernel, kinds] = analyse(kernel, arguments, *more)
        return results[analyse, kernel, kinds]

    names = ("identify_accessed_tensors", "identify_mutated_tensors")
    return tuple(ScopedPatch(module, name, remembering) for name in names if hasattr(module, name))


@functools.cache
def _tuned(kernel: Any, configs: tuple[tuple[tuple[str, int], ...], ...]) -> Any:
    import triton

    def configuration(options: dict[str, int]) -> Any:
        launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
        return triton.Config(options, **launch)

    return triton.autotune(configs=[configuration(dict(options)) for options in configs], key=[])(kernel)


def inductor_modes() -> dict[str, dict[str, Any]]:
    """Inductor's settings for each ``torch.compile`` mode."""
    return {mode: dict(settings) for mode, settings in torch._inductor.list_mode_options().items()}


CUDA_GRAPHS = "triton.cudagraphs"  # Inductor's name of the setting


def fusion_limit(pairs: int) -> dict[str, int]:
    """The setting for how many readers of a buffer Inductor tries to fuse each of them with: at most ``pairs``."""
    from torch._inductor import config

    name = "max_fusion_buffer_group_pairwise_attempts"
    return {name: min(pairs, config.max_fusion_buffer_group_pairwise_attempts)}


def uses_cuda_graphs(patches: dict[str, Any]) -> bool:
    """Whether Inductor replays CUDA graphs under these settings and the global ones."""
    from torch._inductor import config

    return bool(patches.get(CUDA_GRAPHS, config.triton.cudagraphs))


def same_addresses(tensors: Sequence[Any], addresses: list[int], positions: list[int]) -> bool:
    """Whether each tensor at one of ``positions`` is where ``addresses`` has it."""
    check = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
    if check is not None:  # PyTorch for CUDA
        return bool(check(list(tensors), addresses, positions))
    return all(tensors[i].data_ptr() == addresses[i] for i in positions)


def apply_function(function: Any, *args: Any) -> Any:
    """``function.apply`` of an autograd function, without functorch's look at each of hundreds of arguments."""
    return super(torch.autograd.Function, function).apply(*args)


def own_cublas_workspace() -> AbstractContextManager[None]:
    """Around the recording of a CUDA graph: cuBLAS takes its workspace from the graph's memory, and it stays there.

    Otherwise the graph would hold the address of one that PyTorch keeps for the stream, and frees with the next graph
    that Inductor records.
    """
    from torch._inductor.cudagraph_trees import clear_cublas_manager

    return clear_cublas_manager()


def reset_cuda_graphs() -> None:
    """Drop the CUDA graphs that Inductor has recorded, and their memory."""
    if "torch._inductor.cudagraph_trees" in sys.modules:
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


def cuda_graphs_restart(device: torch.device) -> Callable[[], None]:
    """What lets the next compiled call replay from the root of the device's CUDA graphs, as a new training step does.

    It does nothing without CUDA graphs, nor in the middle of a step: there values of the step would be overwritten.
    """
    if device.type != "cuda" or "torch._inductor.cudagraph_trees" not in sys.modules:
        return lambda: None
    from torch._inductor.cudagraph_trees import MarkStepBox, get_manager

    index = torch.cuda.current_device() if device.index is None else device.index
    manager = get_manager(index, create_if_none_exists=False)
    if manager is None or not manager.can_start_new_generation():
        return lambda: None

    def restart() -> None:
        # marking a step ends PyTorch's own counting for good, so only where the user marks them
        if MarkStepBox.mark_step_counter:
            torch.compiler.cudagraph_mark_step_begin()
        else:
            torch._dynamo.mutation_guard.GenerationTracker.generation += 1

    return restart


def inductor_option_names() -> set[str]:
    from torch._inductor import config

    return set(config.get_config_copy())


def aot_eager(gm: GraphModule, inputs: Sequence[Any], partition: Callable[..., Any]) -> Callable[..., Any]:
    """AOTAutograd with the given partition function, both halves run by plain PyTorch."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    def run_graph(graph: GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func

        return make_boxed_func(graph.forward)  # type: ignore[no-any-return]

    # Inductor's decompositions: the joint passes then see the same operators on either path
    compile_aot = aot_autograd(fw_compiler=run_graph, partition_fn=partition, decompositions=select_decomp_table())
    compiled: Any = compile_aot(gm, list(inputs))
    return compiled  # type: ignore[no-any-return]


def default_partition(joint: GraphModule, inputs: Any, **kwargs: Any) -> Any:
    from torch._functorch.partitioners import default_partition as partition

    return partition(joint, inputs, **kwargs)


def keep_in_backward(node: Node) -> None:
    """Tell the partitioner that a node must not be computed in the forward pass, and saved."""
    node.meta["partitioner_tag"] = "must_be_in_backward"


def user_joint_passes() -> tuple[Callable[..., Any], ...]:
    """The pass or passes the user set as ``torch._inductor.config.joint_custom_pre_pass``."""
    from torch._inductor import config

    value = config.joint_custom_pre_pass
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def custom_graph_pass() -> type:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that Inductor would use on the CPU, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return str(get_cpp_compiler())
    except InvalidCxxCompiler:
        return None


def cpu_multiplies_bf16() -> bool:
    """Whether this processor has bfloat16 products in hardware (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def runs_our_kernels() -> bool:
    """Whether the package's Triton kernels may run on the ``cuda`` device: not on ROCm, where nobody has tried them."""
    return has_triton() and torch.version.hip is None


def has_triton() -> bool:
    from torch.utils._triton import has_triton as available

    return bool(available())


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of the whole batch behind what a function under ``torch.vmap`` sees."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def storage_id(tensor: torch.Tensor) -> int:
    """The same number for tensors (fake ones too) that share memory.

    Raises:
        NotImplementedError, RuntimeError: a wrapper subclass, which has no memory of its own.
    """
    return int(unwrapped(tensor).untyped_storage()._cdata)


def source_name(placeholder: Node) -> str:
    """What the user calls a graph input: ``model.layers.0.mlp.up_proj.weight``, or the expression Dynamo has for it."""
    name = source_path(placeholder)
    if name is None:
        return str(placeholder)
    parts = re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", name)
    return ".".join(parts) or name


def source_path(placeholder: Node) -> str | None:
    """The expression that Dynamo has for a graph input: ``L['self']._modules['head']._parameters['weight']``."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return None
    return str(source.name() if callable(source.name) else source.name)  # a method before 2.13


def module_tree(path: str) -> str:
    """The beginning of a :func:`source_path` that leads to the root of the module tree which the tensor is in."""
    return re.sub(r"(\._(?:modules|parameters|buffers)\['[^']+'\])+$", "", path)


@contextmanager
def separate_tracing_context() -> Iterator[None]:
    """Compile a second graph for the same capture.

    AOTAutograd leaves what its backward compiler needs (the buffers it may reuse, say) on the tracing context, and
    compiles the backward only when it first runs: two graphs must not share one.
    """
    from torch._guards import TracingContext, tracing

    context = TracingContext.try_get()
    with tracing(copy.copy(context)):
        yield


def weak_tensor_dict() -> Any:
    """A mapping from tensors (by identity) that does not keep them alive."""
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


def weak_identity_dict() -> Any:
    """A mapping from objects, by identity whatever they define as equal, that does not keep them alive."""
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


def no_saved_tensors_hooks() -> AbstractContextManager[None]:
    """Around what is no part of the user's forward: the saved-tensors hooks in force get none of its tensors."""
    from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing

    return _disable_saved_tensors_hooks_during_tracing()


def under_saved_tensors_hooks() -> bool:
    """Whether a forward hands what it saves to hooks."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def saved_tensors_packers() -> list[Callable[..., Any]]:
    """The pack functions of the saved-tensors hooks in force, the innermost first."""
    autograd: Any = torch._C._autograd
    found = []
    if autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        return []  # none may be set again
    try:
        while (hooks := autograd._top_saved_tensors_default_hooks(True)) is not None:
            autograd._pop_saved_tensors_default_hooks()
            found.append(hooks)
    finally:
        for hooks in reversed(found):
            autograd._push_saved_tensors_default_hooks(*hooks)
    return [pack for pack, _ in found]


def checkpoint_of(pack: Callable[..., Any]) -> tuple[Any, bool] | None:
    """The call of ``torch.utils.checkpoint`` that a pack function belongs to, and whether it recomputes.

    An object that lives as long as what the checkpoint has to recompute; None for other hooks.
    """
    pack = getattr(pack, "_torchdynamo_orig_callable", pack)  # torch 2.13 disables Dynamo in the recomputation's
    code = getattr(pack, "__code__", None)
    if code is None or code.co_filename != _checkpoint_file():
        return None
    cells = dict(zip(code.co_freevars, (cell.cell_contents for cell in pack.__closure__ or ()), strict=True))
    if "frame" in cells:
        return cells["frame"], False
    frame = cells["target_frame_ref"]() if "target_frame_ref" in cells else None
    return None if frame is None else (frame, True)


@functools.cache
def _checkpoint_file() -> str:
    from torch.utils.checkpoint import _checkpoint_hook

    return _checkpoint_hook.__init__.__code__.co_filename


def trace_structured(name: str, text: str) -> None:
    """Hand an artifact to the structured trace log (tlparse)."""
    from torch._logging import trace_structured as emit

    emit("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)


def inductor_cache_dir() -> Path:
    """Where Inductor keeps compiled graphs (the variable TORCHINDUCTOR_CACHE_DIR, or a folder of the user's)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())
