"""What a call does besides computing its value (writes, random numbers); plain functions copied into a graph."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from capture import Captured
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from cggr_compile.passes.analysis.effects import draws, memory, mutated_operands, overlap
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value


@torch.library.custom_op("cggr_test::scale_second", mutates_args={"b"})
def scale_second(a: torch.Tensor, b: torch.Tensor) -> None:
    b.mul_(a.sum())


def setitem(a, b):
    b[0] = a[0]


def shift(a, b):
    b <<= 1


def positional(a, b):
    F.dropout(b, 0.0, True, True)


WRITES = {
    "method": lambda a, b: b.add_(1),
    "setitem": setitem,
    "shift": shift,
    "function": lambda a, b: torch.relu_(b),
    "flag": lambda a, b: F.relu(b, inplace=True),
    "positional flag": positional,
    "out": lambda a, b: torch.mul(a, 2, out=b),
    "list": lambda a, b: torch._foreach_mul_([b], 2),
    "dunder": lambda a, b: b.__iadd__(1),
    "second argument": lambda a, b: scale_second(a, b),
    "packet": lambda a, b: torch.ops.cggr_test.scale_second(a, b),
    "overload": lambda a, b: torch.ops.aten.add_.Tensor(b, a),
    "view": lambda a, b: b.view(-1)[1:].mul_(2),
    "transposed view": lambda a, b: b.t().zero_(),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes(name):
    """Exactly the second argument is written to, by whatever name."""
    integers = name == "shift"
    a, b = (torch.ones(2, 2, dtype=torch.int64 if integers else torch.float32) * i for i in (2, 3))

    def program(a, b):
        WRITES[name](a, b)
        return a + b

    captured = Captured(program, a, b)
    graph = captured.gm.graph
    inputs = dict(zip(captured.inputs, graph.find_nodes(op="placeholder"), strict=True))
    written = [memory(operand) for node in graph.nodes for operand in mutated_operands(node)]
    assert written and all(overlap(m, memory(inputs[b])) and not overlap(m, memory(inputs[a])) for m in written)


@pytest.mark.parametrize("function", [operator.and_, operator.or_, operator.not_, operator.is_])
def test_operators_with_an_underscore_write_nothing(function):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    assert mutated_operands(graph.call_function(function, (x, x))) == []


@pytest.mark.parametrize("writes", [False, True])
def test_writes_inside_of_a_checkpoint(writes):
    def body(x, level):
        y = x * 2
        y += 1  # its own
        if writes:
            level.add_(1)
        return y

    def program(x, level):
        return torch.utils.checkpoint.checkpoint(body, x, level, use_reentrant=False)

    captured = Captured(program, torch.ones(2, requires_grad=True), torch.ones(()))
    (call,) = captured.gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint)
    assert bool(mutated_operands(call)) == writes


@pytest.mark.parametrize(
    ("program", "random"),
    [
        (lambda x: F.dropout(x, 0.1), True),
        (lambda x: F.dropout(x, 0.1, training=False), False),
        (lambda x: F.dropout(x, 0.0), False),
        (lambda x: torch.rand_like(x) + x, True),
        (lambda x: x + torch.randn(2, 2), True),
        (lambda x: torch.bernoulli(x), True),
        (lambda x: x.clone().uniform_(), True),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), True),
        (lambda x: F.scaled_dot_product_attention(x, x, x), False),
        (lambda x: x.softmax(-1) @ x, False),
    ],
)
def test_random_numbers(program, random):
    captured = Captured(program, torch.full((2, 2), 0.5))
    assert any(draws(node) for node in captured.gm.graph.nodes) == random


def test_memory_of_a_batched_value():
    captured = Captured(lambda x: torch.vmap(lambda row: row.view(1, 3).sin())(x), torch.ones(2, 3))
    nodes = [n for n in captured.gm.graph.nodes if isinstance(fake_value(n), torch.Tensor)]
    view, sine = (next(n for n in nodes if str(n.target) == name) for name in ("view", "sin"))
    (x,) = captured.gm.graph.find_nodes(op="placeholder")
    assert overlap(memory(view), memory(x)) and not overlap(memory(sine), memory(x))


def test_unknown_memory_overlaps_all_but_nothing():
    some, none = frozenset({1}), frozenset[int]()
    assert overlap(None, some) and overlap(some, None) and overlap(None, None)
    assert not overlap(None, none) and not overlap(none, some) and not overlap(some, frozenset({2}))


def attended(rows, starts):
    column = torch.arange(5, device=rows.device)
    return (column <= rows[:, None]) & (column >= starts), rows // 2


def test_a_traced_function_computes_the_same():
    emit = Emitter(Graph(), FakeTensorMode(), key="val")
    nodes = [emit.graph.placeholder(name) for name in ("rows", "starts")]
    tensors = [torch.tensor([3, 1, 4]), torch.tensor([0, 0, 1, 1, 1])]
    for node, tensor in zip(nodes, tensors, strict=True):
        node.meta["val"] = emit.fake_mode.from_tensor(tensor)
    found, halved = emit.trace(attended, *nodes)
    emit.graph.output((found, halved))
    assert found.meta["val"].shape == (3, 5) and found.meta["val"].dtype == torch.bool
    for got, expected in zip(GraphModule({}, emit.graph)(*tensors), attended(*tensors), strict=True):
        assert torch.equal(got, expected)
    assert all(isinstance(n.target, torch._ops.OpOverload) for n in emit.graph.nodes if n.op == "call_function")
