"""Row versions of values: what is emitted for them."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

from cggr_compile.passes.joint.row_sparse.annotations import Annotations
from cggr_compile.passes.joint.row_sparse.values import RowValues
from cggr_compile.passes.nodes import fake_value

aten = torch.ops.aten
B, S, K, HEADS, WIDTH = 2, 8, 3, 4, 5


def placeholder(graph, mode, name, *shape, dtype=torch.float32):
    node = graph.placeholder(name)
    with mode:
        node.meta["val"] = torch.empty(shape, dtype=dtype)
    return node


def test_a_view_copies_only_what_it_must():
    graph, mode = Graph(), FakeTensorMode()
    rows = placeholder(graph, mode, "rows", B, K, dtype=torch.int64)
    keep = placeholder(graph, mode, "keep", B, K, dtype=torch.bool)
    rv = RowValues(graph, rows, keep, Annotations(batch=B, length=S, slots=K))
    values = placeholder(graph, mode, "values", B, K, HEADS, WIDTH)
    heads_first = rv.emit.call(aten.permute.default, values, [0, 2, 1, 3])
    assert rv.view(heads_first, [B, HEADS, K, WIDTH]) is heads_first, "the shape it has"
    for node, shape, copies in [(values, [B, K, HEADS * WIDTH], 0), (heads_first, [B, HEADS * K, WIDTH], 1)]:
        before = len(graph.find_nodes(op="call_function", target=aten.clone.default))
        assert list(fake_value(rv.view(node, shape)).shape) == shape
        assert len(graph.find_nodes(op="call_function", target=aten.clone.default)) - before == copies
