"""Every torch-version branch and private import of the project (tested on torch 2.11 and 2.13)."""

from __future__ import annotations

import copy
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node


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


@contextmanager
def vmap_levels_kept() -> Iterator[None]:
    """Leave the levels of ``torch.vmap`` that are still open at the end, as after an exception."""
    from torch._C._functorch import _vmap_decrement_nesting, get_dynamic_layer_stack_depth

    depth = get_dynamic_layer_stack_depth()
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


def recompilations_left() -> int | None:
    """How many more graphs Dynamo compiles for the frame it is capturing, this one included; None outside."""
    from torch._dynamo import config
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        tx = InstructionTranslator.current_tx()
    except AttributeError:
        tx = None
    return None if tx is None else int(config.recompile_limit) - len(_debug_get_cache_entry_list(tx.f_code))


def frame_scopes() -> dict[str, dict[str, Any]]:
    """Locals (L) and globals (G) of the frame that Dynamo is compiling; empty outside a capture."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        tx = InstructionTranslator.current_tx()
    except AttributeError:  # the thread-local is unset outside a capture (2.13; 2.11 returns None)
        tx = None
    return {} if tx is None else {"L": tx.f_locals, "G": tx.f_globals}


def module_at(path: str, scopes: dict[str, dict[str, Any]]) -> torch.nn.Module | None:
    """The module that an ``nn_module_stack`` path names: ``L['self'].model.layers.0``, ``L['args'][0].model``."""
    head = re.match(r"([LG])\['([^']+)'\]", path)
    if head is None or head[1] not in scopes:
        return None
    value: Any = scopes[head[1]].get(head[2])
    for step in re.finditer(r"\[(\d+)\]|\['([^']+)'\]|([^.\[\]]+)", path[head.end() :]):
        index, key, name = step.groups()
        try:
            value = getattr(value, name) if name else value[int(index) if index else key]
        except (AttributeError, LookupError, TypeError):
            return None
    return value if isinstance(value, torch.nn.Module) else None


def compile_fx(gm: GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx as inductor_compile_fx

    with _quick_minimum_cuts():
        compiled: Any = inductor_compile_fx(gm, list(inputs), config_patches=config_patches)
    return compiled  # type: ignore[no-any-return]


@contextmanager
def _quick_minimum_cuts() -> Iterator[None]:
    """Let the partitioner cut graphs with Boykov and Kolmogorov's algorithm, a tenth of preflow-push's time or less.

    The cut is the same: networkx takes the one nearest to the sink, whatever flow it found.
    """
    import networkx
    from networkx.algorithms.flow import boykov_kolmogorov

    usual = networkx.minimum_cut

    def minimum_cut(graph: Any, source: Any, sink: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = {} if args else {"flow_func": boykov_kolmogorov}
        return usual(graph, source, sink, *args, **{**chosen, **kwargs})

    networkx.minimum_cut = minimum_cut
    try:
        yield
    finally:
        networkx.minimum_cut = usual


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
    """In a lowering: the strides of what ``stored`` returned."""
    strides = _integers(node.get_stride())
    assert strides is not None, "static sizes have static strides"
    return strides


def _integers(values: Sequence[Any]) -> tuple[int, ...] | None:
    return tuple(int(v) for v in values) if not any(getattr(v, "free_symbols", None) for v in values) else None


def stored(node: Any, last_contiguous: bool = False, contiguous: bool = False) -> Any:
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


def address(node: Any) -> int:
    """In a lowering: where the first element of what ``stored`` returned lies, up to multiples of 16 bytes."""
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
    """A template for :func:`fastest`. ``grid``: number of programs, of the output's sizes and the constants."""
    from torch._inductor.select_algorithm import TritonTemplate

    return TritonTemplate(name=name, grid=grid, source=source)


def operator_choice(name: str, op: Any, arrange: Callable[..., tuple[Any, ...]]) -> Any:
    """A call of an operator, for :func:`fastest`. ``arrange``: its arguments, of the tensors and options there."""
    from torch._inductor import ir
    from torch._inductor.select_algorithm import ExternKernelChoice

    def call(*tensors: torch.Tensor, **options: Any) -> Any:
        return op(*arrange(*tensors, **options))

    def generate(*nodes: Any, **options: Any) -> Any:
        return ir.FallbackKernel.create(op, *arrange(*nodes, **options))

    return ExternKernelChoice(call, name=name, has_out_variant=False, kernel_creator=generate)


def fastest(
    name: str,
    tensors: Sequence[Any],
    shape: Sequence[int],
    dtype: torch.dtype,
    operators: Sequence[tuple[Any, dict[str, Any]]],
    template: Any,
    ways: Sequence[dict[str, Any]],
    *,
    written: Sequence[Any] = (),
    examples: dict[int, Callable[[Any], torch.Tensor]] | None = None,
) -> Any:
    """In a lowering: an operator's result, computed in the way that Inductor's autotuner finds fastest.

    Args:
        tensors: nodes that ``stored`` returned. shape, dtype: of the result, which is contiguous.
        operators: each an :func:`operator_choice` and its options; the first is used if nothing can be timed.
        template, ways: a :func:`triton_template` and its constants, num_warps and num_stages, one choice for each.
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
    for way in ways:
        template.maybe_append_choice(choices, input_nodes=list(tensors), layout=layout, **more, **way)
    # a fused reader would be timed with each choice: there is none for a result that is reduced
    found = autotune_select_algorithm(
        name, choices, list(tensors), layout, input_gen_fns=examples, return_multi_template=False
    )
    return found[0] if isinstance(found, tuple) else found  # 2.13 returns the choice too


def written_side_by_side(parts: Sequence[Any], axis: int) -> Any:
    """In a lowering: one buffer that the kernels of ``parts`` write into, each at its place along ``axis``."""
    from torch._inductor import ir

    return ir.TensorBox(ir.ConcatKernel.create(parts, axis))


def launch(kernel: Any, pointers: dict[str, Any], arguments: dict[str, Any], ways: Sequence[tuple[int, Any]]) -> None:
    """In a lowering: one launch of a Triton kernel, as torch.compile launches the kernels of users.

    Args:
        pointers: nodes by the names of the kernel's parameters. arguments: its other arguments.
        ways: (number of programs, block sizes with num_warps and num_stages); if there are several, they are timed.
    """
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation
    from torch._inductor import config
    from torch._inductor.lowering import lowerings

    ways = ways if config.max_autotune else ways[:1]
    tuned = _tuned(kernel, tuple(tuple(sorted(options.items())) for _, options in ways))
    with _analysed_once():
        lowerings[triton_kernel_wrapper_mutation](
            kernel_idx=kernel_side_table.add_kernel(tuned),
            constant_args_idx=kernel_side_table.add_constant_args(arguments),
            grid=[(programs, 1, 1) for programs, _ in ways],
            tma_descriptor_metadata={},
            kwargs=pointers,
        )


@contextmanager
def _analysed_once() -> Iterator[None]:
    """Look only once for what a kernel writes: for every launch, Inductor translates the kernel to find that out."""
    from torch._higher_order_ops import triton_kernel_wrap as module

    names = ("identify_accessed_tensors", "identify_mutated_tensors")
    analyses = {name: getattr(module, name) for name in names if hasattr(module, name)}
    for name, analyse in analyses.items():
        setattr(module, name, _remembering(analyse))
    try:
        yield
    finally:
        for name, analyse in analyses.items():
            setattr(module, name, analyse)


_ANALYSES: dict[Any, Any] = {}


def _remembering(analyse: Callable[..., Any]) -> Callable[..., Any]:
    """``analyse``, with its results kept: of tensors only the data types matter."""

    def remembering(kernel: Any, arguments: dict[str, Any], descriptors: Any) -> Any:
        kinds = tuple((name, getattr(value, "dtype", value)) for name, value in arguments.items())
        key = (analyse, kernel, kinds)
        if key not in _ANALYSES:
            _ANALYSES[key] = analyse(kernel, arguments, descriptors)
        return _ANALYSES[key]

    return remembering


@functools.cache
def _tuned(kernel: Any, ways: tuple[tuple[tuple[str, int], ...], ...]) -> Any:
    import triton

    def configuration(options: dict[str, int]) -> Any:
        launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
        return triton.Config(options, **launch)

    return triton.autotune(configs=[configuration(dict(options)) for options in ways], key=[])(kernel)


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


def storage_id(tensor: torch.Tensor) -> int:
    """The same number for tensors (fake ones too) that share memory."""
    return int(tensor.untyped_storage()._cdata)


def source_name(placeholder: Node) -> str:
    """What the user calls a graph input: ``model.layers.0.mlp.up_proj.weight``, or the expression Dynamo has for it."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return str(placeholder)
    name = source.name() if callable(source.name) else source.name  # a method before 2.13
    parts = re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", name)
    return ".".join(parts) or str(name)


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


def trace_structured(name: str, text: str) -> None:
    """Hand an artifact to the structured trace log (tlparse)."""
    from torch._logging import trace_structured as emit

    emit("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)


def inductor_cache_dir() -> Path:
    """Where Inductor keeps compiled graphs (the variable TORCHINDUCTOR_CACHE_DIR, or a folder of the user's)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())
