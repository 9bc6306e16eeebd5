"""Every private name of PyTorch that the project leans on, and every version branch (tested on torch 2.11 and 2.13).

| file | what it holds |
|---|---|
| ``frames.py`` | what Dynamo is compiling: code, variables, its limits; frames of PyTorch's on Python's stack |
| ``graph_breaks.py`` | where and why a graph ends before the captured function does |
| ``callers.py`` | who runs a compiled graph: the module, the captured frame |
| ``sources.py`` | Dynamo's names of graph inputs and modules, and guards on a module's mode |
| ``modules.py`` | what ``torch.compile`` makes of a module, copies that share its state, what it stores |
| ``operators.py`` | what a node can call: operators with their schemas, higher-order operators |
| ``modes.py`` | calls in a graph that change grad mode, autocast, inference mode or a level of vmap |
| ``sizes.py`` | symbolic sizes |
| ``fake_tensors.py`` | fake tensors and the modes that make them |
| ``tracing.py`` | traces of functions, and the contexts that graphs are compiled in |
| ``tensors.py`` | the memory behind a tensor, mappings that do not keep their keys alive |
| ``saved_tensors.py`` | the hooks that a forward pass hands its saved tensors to |
| ``checkpoints.py`` | activation checkpoints |
| ``partition.py`` | AOTAutograd without Inductor, and the cut of the joint graph |
| ``inductor.py`` | compiling with Inductor: its settings, its hooks, its cache |
| ``lowering.py`` | what the lowering of an operator is made of: registration, layouts, buffers |
| ``templates.py`` | what Inductor's autotuner chooses between |
| ``launches.py`` | launches of Triton kernels from a lowering |
| ``cuda_graphs.py`` | CUDA graphs, Inductor's and our own |
| ``ddp.py`` | how DistributedDataParallel cuts what Dynamo captures, and its processes |
| ``collectives.py`` | collectives inside of graphs, sharded tensors |
| ``fsdp.py`` | the processes of FSDP2, and where all processes have met |
| ``devices.py`` | what the processor, the compiler and the accelerator can do |
| ``trace_log.py`` | PyTorch's structured trace log |

Names are used as ``compat.name``. Importing the package imports neither Inductor nor Triton: the functions that need
them do.
"""

# ruff: noqa: F401  (names for others)

from __future__ import annotations

from cggr_compile.compat.callers import Caller, caller
from cggr_compile.compat.checkpoints import CHECKPOINT_CONTEXT, checkpoint_of, next_checkpoint_id
from cggr_compile.compat.collectives import (
    ALL_GATHER,
    ALL_REDUCE,
    IN_PLACE,
    REDUCE_SCATTER,
    WAIT,
    is_sharded,
    local_part,
)
from cggr_compile.compat.cuda_graphs import (
    apply_function,
    cuda_graphs_restart,
    own_cublas_workspace,
    reset_cuda_graphs,
    same_addresses,
)
from cggr_compile.compat.ddp import ddp_cut, ddp_group
from cggr_compile.compat.devices import (
    TORCH_VERSION,
    cpp_compiler,
    cpu_multiplies_bf16,
    has_triton,
    multiplies_in_tf32,
    runs_our_kernels,
)
from cggr_compile.compat.fake_tensors import (
    capture_fake_mode,
    is_fake,
    static_fake_mode,
    symbolic_sizes_kept,
    values_of,
)
from cggr_compile.compat.frames import (
    before_every_compilation,
    below_dynamo,
    captured_code,
    compilation,
    frame_scopes,
    is_compiled_call,
    recompilations_left,
)
from cggr_compile.compat.fsdp import default_store, fsdp_group
from cggr_compile.compat.graph_breaks import (
    GraphBreak,
    break_at_end,
    capture_again,
    graph_breaks,
    nested_graph_breaks,
    resumed_at,
)
from cggr_compile.compat.inductor import (
    CUDA_GRAPHS,
    compile_fx,
    custom_graph_pass,
    fusion_limit,
    hash_of_files,
    inductor_cache_dir,
    inductor_modes,
    inductor_option_names,
    sort_stably,
    user_joint_passes,
    user_post_grad_passes,
    uses_cuda_graphs,
)
from cggr_compile.compat.launches import launch
from cggr_compile.compat.lowering import (
    alignment_offset,
    call_operator,
    empty_buffer,
    realize_fixed_layout,
    realized,
    register_inductor_lowering,
    static_shape,
    static_strides,
    transposed_matrices,
    written_side_by_side,
)
from cggr_compile.compat.modes import (
    ENTER_AUTOCAST,
    ENTER_INFERENCE,
    EXIT_AUTOCAST,
    EXIT_INFERENCE,
    SET_GRAD,
    enters_or_leaves_vmap,
    modes_kept,
)
from cggr_compile.compat.modules import (
    compiled_call,
    forward_hooks,
    is_compiled,
    original_module,
    own_buffers,
    own_parameters,
    plain_call,
    remove_forward_hook,
    set_compiled_call,
    with_child,
)
from cggr_compile.compat.operators import CROSS_ENTROPIES, HigherOrderOperator, OpOverload, OpOverloadPacket, schema
from cggr_compile.compat.partition import (
    MODULE_STACKS,
    aot_eager,
    default_partition,
    keep_in_backward,
    minimum_partition,
)
from cggr_compile.compat.saved_tensors import (
    kept_for_backward,
    no_saved_tensors_hooks,
    saved_tensors_packers,
    under_saved_tensors_hooks,
)
from cggr_compile.compat.sizes import depends_on_data, hint, marked_dynamic, pin_size, symbols
from cggr_compile.compat.sources import (
    copy_sources,
    guard_mode,
    module_at,
    module_tree,
    outermost_module,
    source_name,
    source_path,
    without_source,
)
from cggr_compile.compat.templates import autotune, operator_choice, times_templates, triton_template
from cggr_compile.compat.tensors import storage_id, unwrapped, weak_identity_dict, weak_tensor_dict
from cggr_compile.compat.trace_log import trace_structured
from cggr_compile.compat.tracing import (
    compilation_id,
    compiling_later,
    separate_tracing_context,
    static_inputs,
    traced,
    tracing_under,
)
