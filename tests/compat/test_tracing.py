"""Traces, and the contexts that graphs are compiled in."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cggr_compile import compat


def test_plain_functions_become_graphs_of_aten_calls():
    with FakeTensorMode() as mode:
        graph = compat.traced(lambda x: x + torch.arange(3), [torch.empty(2, 3)], mode).graph
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.prims.iota.default, torch.ops.aten.add.Tensor]


def test_compiling_later():
    """A tracing context with static sizes, as AOTAutograd asks for them, and none afterwards."""
    from torch._guards import TracingContext

    with compat.compiling_later(None):
        mode = TracingContext.get().fake_mode
        fake = mode.from_tensor(torch.zeros(3, 7), static_shapes=False, symbolic_context=None, source=None, trace=True)
        assert [type(size) for size in fake.shape] == [int, int]
    assert TracingContext.try_get() is None and compat.compilation_id() is None


def test_a_second_graph_has_a_tracing_context_of_its_own():
    from torch._guards import TracingContext, tracing

    first = TracingContext(None)
    with tracing(first):
        with compat.separate_tracing_context():
            TracingContext.get().fw_metadata = "of the second graph"
        assert TracingContext.get() is first and first.fw_metadata is None
    with compat.separate_tracing_context():  # outside a capture
        assert TracingContext.try_get() is None


def test_arguments_that_dynamo_does_not_know_have_numbers_for_sizes():
    from torch._guards import TracingContext, tracing
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    ours, other = torch.zeros(7), torch.zeros(5)
    with tracing(TracingContext(mode)), compat.static_inputs([ours]):
        assert isinstance(mode.from_tensor(ours).shape[0], int)
        assert isinstance(mode.from_tensor(other).shape[0], torch.SymInt)  # else nothing is to be done
    with compat.static_inputs([ours]):  # outside a capture
        assert TracingContext.try_get() is None
