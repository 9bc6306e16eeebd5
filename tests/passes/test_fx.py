"""Plain functions of tensors, copied into a graph."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from cggr_compile.passes.fx import Emitter


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
