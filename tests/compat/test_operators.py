"""Operators that a node can call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch._dynamo.testing import EagerAndRecordGraphs

from cggr_compile import compat


def test_schemas():
    schema = compat.schema(torch.ops.aten.add_.Tensor)
    assert [argument.name for argument in schema.arguments] == ["self", "other", "alpha"]
    assert schema.is_mutable and schema.arguments[0].alias_info.is_write and schema.arguments[2].default_value == 1
    assert not compat.schema(torch.ops.aten.add.Tensor).is_mutable


def test_kinds_of_operators():
    assert isinstance(torch.ops.aten.add.Tensor, compat.OpOverload)
    assert isinstance(torch.ops.aten.add, compat.OpOverloadPacket)
    assert isinstance(torch.ops.higher_order.flex_attention, compat.HigherOrderOperator)


def test_cross_entropies():
    """Whatever calls of them are in a graph, their arguments can be read by name."""
    captured = EagerAndRecordGraphs()
    for function in (F.cross_entropy, *compat.CROSS_ENTROPIES[2:]):
        torch.compile(lambda x, y, f=function: f(x, y, ignore_index=3), backend=captured)(
            torch.randn(2, 4), torch.tensor([0, 3])
        )
    assert len(captured.graphs) == 3
    for gm in captured.graphs:
        (call,) = (node for node in gm.graph.nodes if node.op == "call_function")
        assert call.target in compat.CROSS_ENTROPIES
        given = call.normalized_arguments(gm, normalize_to_only_use_kwargs=True).kwargs
        assert given["ignore_index"] == 3 and given["reduction"] in ("mean", 1) and given["label_smoothing"] == 0.0
        assert str(given["target"]).endswith("y_") and given["weight"] is None
