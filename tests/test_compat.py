"""Every private name that compat.py leans on exists, with the signature it is called with."""

from __future__ import annotations

import inspect
import math
import random
import weakref

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networkx.algorithms.flow import boykov_kolmogorov, preflow_push
from torch._subclasses.fake_tensor import FakeTensorMode

from cggr_compile import compat
from cggr_compile.backend import cggr


def test_private_signatures():
    from torch._dynamo import config
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._functorch.partitioners import default_partition
    from torch._inductor.compile_fx import compile_fx

    assert "config_patches" in inspect.signature(compile_fx).parameters
    assert "num_fwd_outputs" in inspect.signature(default_partition).parameters
    assert callable(InstructionTranslator.current_tx)
    assert callable(aot_autograd)
    assert config.recompile_limit > 0 and _debug_get_cache_entry_list(test_modes.__code__) == []
    assert compat.next_checkpoint_id() < compat.next_checkpoint_id()
    assert inspect.isclass(compat.custom_graph_pass())
    assert {"joint_custom_pre_pass", compat.CUDA_GRAPHS} <= compat.inductor_option_names()


def test_what_is_read_of_a_compilation():
    """What in Dynamo tells a graph break, its limits, and the pieces that it cuts for DistributedDataParallel."""
    from torch._dynamo import config
    from torch._dynamo.backends import distributed
    from torch._dynamo.cache_size import exceeds_recompile_limit
    from torch._dynamo.convert_frame import CatchErrorsWrapper, _compile
    from torch._dynamo.eval_frame import _TorchDynamoContext
    from torch._dynamo.output_graph import GraphCompileReason
    from torch._dynamo.utils import graph_break_reasons, register_hook_for_recompile_user_context

    assert isinstance(graph_break_reasons, list) and callable(register_hook_for_recompile_user_context)
    assert list(inspect.signature(GraphCompileReason).parameters) == ["reason", "user_stack", "graph_break"]
    assert list(inspect.signature(exceeds_recompile_limit).parameters) == ["cache_size", "compile_id"]
    assert {"code", "locals", "cache_size", "compile_id"} <= set(inspect.signature(_compile).parameters)
    assert config.accumulated_recompile_limit > 0 and hasattr(config, "optimize_ddp")
    assert callable(distributed.SubmodCompiler.compile_submod) and callable(CatchErrorsWrapper.__call__)
    assert "compile_wrapper" in inspect.getsource(_TorchDynamoContext.__call__)


def test_a_graph_holds_for_one_mode():
    seen = []

    def backend(gm, inputs):
        seen.append(compat.guard_mode("L['self']"))
        return gm.forward

    class Doubled(torch.nn.Module):  # which does not read its mode
        def forward(self, x):
            return x * 2

    model = Doubled()
    model.compile(backend=backend)
    for training in (True, False, True):
        model.train(training)(torch.ones(2))
    assert len(seen) == 2


def test_graph_breaks_and_places():
    found = []

    def keep(gm, inputs):
        found.append((compat.break_at_end(), compat.resumed_at(compat.captured_code())))
        return gm.forward

    def step(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    line = step.__code__.co_firstlineno + 2
    torch.compile(step, backend=keep)(torch.ones(2))
    (first, not_resumed), (last, resumed) = found
    assert first is not None and (first.stack[-1].filename, first.stack[-1].lineno) == (__file__, line)
    assert compat.graph_breaks() == [first] and last is None and not_resumed is None and resumed == line


def test_what_is_about_to_be_compiled():
    seen = []

    def hook():
        seen.append(compat.compilation())
        return ""

    def step(x):
        return x + 1

    compat.before_every_compilation(hook)
    compat.before_every_compilation(hook)
    try:
        with torch._dynamo.config.patch(recompile_limit=1):
            run = torch.compile(step, backend="eager", dynamic=False)
            run(torch.ones(2)), run(torch.ones(3))
    finally:
        torch._dynamo.utils.get_hook_for_recompile_user_context().remove(hook)
    assert [(one.code, one.limit, one.value) for one in seen] == [
        (step.__code__, None, None),
        (step.__code__, "recompile_limit", 1),
    ]
    assert list(seen[0].scope) == ["x"]


def test_plain_functions_become_graphs_of_aten_calls():
    with FakeTensorMode() as mode:
        graph = compat.traced(lambda x: x + torch.arange(3), [torch.empty(2, 3)], mode).graph
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.prims.iota.default, torch.ops.aten.add.Tensor]


def test_modes():
    modes = compat.inductor_modes()
    assert modes["default"] == {} and modes["reduce-overhead"]["triton.cudagraphs"]


def test_outside_a_capture():
    assert compat.frame_scopes() == {} and compat.recompilations_left() is None
    assert compat.compilation_id() is None and compat.captured_code() is None and compat.compilation() is None
    assert compat.break_at_end() is None and compat.below_dynamo(inspect.currentframe()) is None
    assert not compat.in_ddp_piece(inspect.currentframe()) and compat.resumed_at(test_modes.__code__) is None


def test_compiling_later():
    """A tracing context with static sizes, as AOTAutograd asks for them, and none afterwards."""
    from torch._guards import TracingContext

    with compat.compiling_later(None):
        mode = TracingContext.get().fake_mode
        fake = mode.from_tensor(torch.zeros(3, 7), static_shapes=False, symbolic_context=None, source=None, trace=True)
        assert [type(size) for size in fake.shape] == [int, int]
    assert TracingContext.try_get() is None


def test_static_fake_tensors():
    mode, real = compat.static_fake_mode(), torch.zeros(3, 7)
    assert [type(size) for size in mode.from_tensor(real).shape] == [int, int]
    assert compat.is_fake(mode.from_tensor(real)) and not compat.is_fake(real)


def test_levels_of_vmap_are_left_after_an_exception():
    graphs = []

    def keep(gm, inputs):
        graphs.append(gm)
        return gm.forward

    torch.compile(torch.vmap(lambda x: x + 1), backend=keep)(torch.zeros(2))
    calls = [node for node in graphs[0].graph.nodes if compat.enters_or_leaves_vmap(node)]
    entering = next(node for node in calls if "increment" in node.name)
    with pytest.raises(ValueError), compat.modes_kept():
        assert entering.target(*entering.args) == 1
        raise ValueError
    with compat.modes_kept():
        assert entering.target(*entering.args) == 1


def test_calls_that_change_modes():
    """Dynamo's names for them, with the arguments that are read off a graph, or emitted."""
    parameters = [list(inspect.signature(f).parameters) for f in (compat.ENTER_AUTOCAST, compat.EXIT_AUTOCAST)]
    assert parameters == [["vals"], ["mode"]]
    assert list(inspect.signature(torch.autocast).parameters)[:4] == [
        *("device_type", "dtype", "enabled", "cache_enabled")
    ]
    assert list(inspect.signature(compat.ENTER_INFERENCE).parameters) == ["mode"]
    assert list(inspect.signature(compat.EXIT_INFERENCE).parameters) == ["mode"]
    graphs = []

    def keep(gm, inputs):
        graphs.append([node.target for node in gm.graph.nodes if node.op == "call_function"])
        return gm.forward

    def program(x):
        with torch.no_grad(), torch.autocast("cpu"), torch.inference_mode():
            return x + 1

    torch.compile(program, backend=keep)(torch.zeros(2))
    known = {*(compat.SET_GRAD, compat.ENTER_AUTOCAST, compat.EXIT_AUTOCAST), compat.ENTER_INFERENCE}
    assert known | {compat.EXIT_INFERENCE} <= set(graphs[0])


def test_modes_are_kept():
    with pytest.raises(ValueError), compat.modes_kept():
        compat.ENTER_AUTOCAST("cpu", torch.bfloat16, True, None)
        compat.SET_GRAD(False)
        raise ValueError
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_unwrapped():
    seen = []
    x = torch.zeros(2, 3)
    torch.vmap(lambda row: seen.append(compat.storage_id(row) == compat.storage_id(x)) or row)(x)
    assert seen == [True] and compat.unwrapped(x) is x


def test_module_at():
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(1, 1)])})
    scopes = {"L": {"self": model, "args": (model,), "kwargs": {"net": model}}, "G": {"net": model}}
    # a decorator of forward is the captured frame where it is compiled: the model is its first argument
    for head in ("L['self']", "L['args'][0]", "L['kwargs']['net']"):
        assert compat.module_at(f"{head}.layers.0", scopes) is model["layers"][0]
    assert compat.module_at("G['net']", scopes) is model
    for path in (
        "L['other']",
        "L['self'].layers.7",
        "nonsense",
        "L['self'].layers.0.weight",
        "L['args'][1]",
        "L['self'][0]",
    ):
        assert compat.module_at(path, scopes) is None


def test_beginnings_of_paths():
    model = torch.nn.ModuleDict({"inner": torch.nn.Linear(1, 1)})
    model.hidden = [torch.nn.Linear(1, 1)]
    scopes = {"L": {"step": {"models": (3, model)}}, "G": {}}
    root = "L['step']['models'][1]"
    for path in (f"{root}._modules['inner']._parameters['weight']", f"{root}.hidden[0]._parameters['weight']"):
        assert compat.outermost_module(path, scopes) == root
    assert compat.module_tree(f"{root}._modules['inner']._parameters['weight']") == root
    hidden = compat.module_tree(f"{root}.hidden[0]._parameters['weight']")
    assert compat.module_at(hidden, scopes) is model.hidden[0]
    for path in ("L['step']['models'][0]", "G['step']", "L['other'].x", "L['step'].models", "3"):
        assert compat.outermost_module(path, scopes) is None


def test_callers():
    """Read off the stack: what torch.compile was given, and the captured frame with its variables."""
    found = []

    def read(gm, inputs):
        code = compat.captured_code()
        assert code is not None and compat.caller(code).captured is None

        def run(*args):
            found.append((compat.caller(code).module, compat.caller(code).scopes))
            return gm.forward(*args)

        return run

    class Model(torch.nn.Module):
        def forward(self, x):
            return x * 2

    model, x = Model(), torch.ones(2)
    torch.compile(model, backend=read)(x)
    torch.compile(model.forward, backend=read)(x)
    torch.compile(torch.nn.ReLU(), backend=read)(x)  # Dynamo wraps what is PyTorch's own
    torch.compile(lambda model, x: model(x), backend=read)(model, x)
    modules = [module for module, _ in found]
    assert modules[:2] == [model, model] and type(modules[2]) is torch.nn.ReLU and modules[3] is None
    assert [scopes["L"].get("self") for _, scopes in found[:2]] == [model, model]
    assert found[3][1]["L"]["model"] is model and found[3][1]["G"]["compat"] is compat
    assert compat.caller(None) == compat.Caller(None, None) and compat.captured_code() is None
    assert compat.original_module(torch.compile(model)) is model is compat.original_module(model)


def test_saved_tensors_hooks():
    names = []

    def hooks(name):
        return torch.autograd.graph.saved_tensors_hooks(lambda x: names.append(name) or x, lambda x: x)

    x = torch.ones(2, requires_grad=True)
    assert not compat.under_saved_tensors_hooks() and compat.saved_tensors_packers() == []
    with hooks("outer"), hooks("inner"):
        assert compat.under_saved_tensors_hooks()
        for pack in compat.saved_tensors_packers():
            pack(x)
        assert names == ["inner", "outer"]
        with compat.no_saved_tensors_hooks():
            x.sin().sum()
        assert names == ["inner", "outer"]
        x.sin().sum()  # those in force are what they were
        assert names == ["inner", "outer", "inner"]
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert compat.saved_tensors_packers() == [] and not compat.under_saved_tensors_hooks()


def test_checkpoints_are_known_by_their_hooks():
    seen = []

    def body(x):
        seen.append([compat.checkpoint_of(pack) for pack in compat.saved_tensors_packers()])
        return x.sin()

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        out = torch.utils.checkpoint.checkpoint(body, torch.ones(2, requires_grad=True), use_reentrant=False)
    out.sum().backward()
    (forward, other), (again, *_) = seen
    assert other is None and forward[0] is again[0] and (forward[1], again[1]) == (False, True)


def test_source_names():
    names = []

    def read(gm, inputs):
        names.extend(compat.source_name(node) for node in gm.graph.find_nodes(op="placeholder"))
        return gm.forward

    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.BatchNorm1d(2)])})
    extra = {"scale": torch.ones(2)}
    torch.compile(lambda x: model["layers"][0](x) * extra["scale"], backend=read)(torch.ones(3, 2))
    assert {"layers.0.weight", "layers.0.bias", "layers.0.running_mean"} <= set(names)
    assert "L['x']" in names and any("scale" in name for name in names)
    assert compat.source_name(torch.fx.Graph().placeholder("plain")) == "plain"


def test_a_second_graph_has_a_tracing_context_of_its_own():
    from torch._guards import TracingContext, tracing

    first = TracingContext(None)
    with tracing(first):
        with compat.separate_tracing_context():
            TracingContext.get().fw_metadata = "of the second graph"
        assert TracingContext.get() is first and first.fw_metadata is None
    with compat.separate_tracing_context():  # outside a capture
        assert TracingContext.try_get() is None


def test_dynamo_reset_drops_cuda_graphs(monkeypatch):
    from torch._inductor import cudagraph_trees

    dropped = []
    monkeypatch.setattr(cudagraph_trees, "reset_cudagraph_trees", lambda: dropped.append(1))
    torch.compile(lambda x: x + 1, backend=cggr)(torch.ones(1))
    torch._dynamo.reset()
    assert dropped


def test_user_joint_passes():
    def one(graph):
        return None

    assert compat.user_joint_passes() == ()
    with torch._inductor.config.patch(joint_custom_pre_pass=one):
        assert compat.user_joint_passes() == (one,)


def test_cpp_compiler(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def missing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert compat.cpp_compiler() is None


def test_a_kernel_is_analysed_once_per_graph(monkeypatch):
    """For equal arguments; of tensors their data types count."""
    from torch._inductor.virtualized import V

    class Graph:
        """A GraphLowering's stand-in."""

    module = pytest.importorskip("torch._higher_order_ops.triton_kernel_wrap")
    names = [n for n in ("identify_accessed_tensors", "identify_mutated_tensors") if hasattr(module, n)]
    assert names, "Inductor analyses kernels under another name"
    calls = []

    def analyse(kernel, arguments, descriptors):
        calls.append(dict(arguments))
        return len(calls)

    monkeypatch.setattr(module, names[0], analyse)
    wide, narrow = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float16)
    results = []
    for graph in (Graph(), Graph()):
        for tensor, size in ((wide, 4), (torch.ones(9, dtype=torch.float64), 4), (narrow, 4), (wide, 5)):
            with V.set_graph_handler(graph), compat._analysed_once():
                results.append(getattr(module, names[0])("kernel", {"x": tensor, "size": size}, {}))
    assert results == [1, 1, 2, 3, 4, 4, 5, 6] and getattr(module, names[0]) is analyse
    weakref.ref(torch._inductor.graph.GraphLowering.__new__(torch._inductor.graph.GraphLowering))


def test_fusion_limit():
    from torch._inductor import config

    (name,) = limit = compat.fusion_limit(16)
    assert limit[name] == 16 and name in compat.inductor_option_names()
    with config.patch({name: 4}):  # the user's own
        assert compat.fusion_limit(16)[name] == 4


def test_templates():
    from torch._inductor import config
    from torch._inductor.lowering import maybe_layout_constraints, tag_to_layout_constraint
    from torch._inductor.select_algorithm import ExternKernelChoice, TritonTemplate, autotune_select_algorithm
    from torch._library.utils import get_layout_constraint_tag

    from cggr_compile import lowerings
    from cggr_compile.ops.score import score_partials

    assert {"name", "grid", "source"} <= set(inspect.signature(TritonTemplate).parameters)
    assert {"has_out_variant", "kernel_creator"} <= set(inspect.signature(ExternKernelChoice).parameters)
    assert callable(autotune_select_algorithm)
    gpu = torch.device("cuda", 0)  # of which nothing is asked
    assert not config.max_autotune and not compat.times_templates(gpu, torch.float32)
    with config.patch(max_autotune=True, pipeline_max_autotune_gemm=True):
        assert not compat.times_templates(gpu, torch.float32)
    lowerings.register()
    wanted = tag_to_layout_constraint(get_layout_constraint_tag(score_partials, with_default=True))
    assert maybe_layout_constraints(score_partials) is wanted


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_quick_minimum_cuts_are_the_same_cuts(seed):
    draw = random.Random(seed)
    graph = networkx.DiGraph()
    graph.add_edge("source", 0, capacity=math.inf)
    for node in range(25):
        for other in draw.sample(range(node + 1, 27), min(3, 26 - node)):
            graph.add_edge(node, "sink" if other == 26 else other, capacity=draw.choice([0, 1, 1, 2, 5]))
    graph.add_edge(25, "sink", capacity=1)
    usual = networkx.minimum_cut
    value, parts = usual(graph, "source", "sink")
    with compat._quick_minimum_cuts():
        assert networkx.minimum_cut is not usual
        assert networkx.minimum_cut(graph, "source", "sink") == (value, parts)
        assert networkx.minimum_cut(graph, "source", "sink", flow_func=preflow_push) == (value, parts)
    assert networkx.minimum_cut is usual


def test_the_partitioner_takes_quick_minimum_cuts(monkeypatch):
    calls = []
    monkeypatch.setattr(
        networkx.algorithms.flow, "boykov_kolmogorov", lambda *a, **k: calls.append(a) or boykov_kolmogorov(*a, **k)
    )
    x = torch.randn(4, 4, requires_grad=True)
    run = torch.compile(
        lambda x: (x.sin() @ x.cos()).sum(), backend=lambda gm, inputs: compat.compile_fx(gm, inputs, {})
    )
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        run(x)
    assert len(calls) == 1
