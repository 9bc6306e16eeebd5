"""Checks of the joint passes that compute several operations of the backward pass as one."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx


def traced(function: Any, *arguments: Any) -> GraphModule:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return make_fx(function, tracing_mode="fake")(*arguments)


def check(
    joint_pass: Any, operator: Any, function: Any, *arguments: Any, before: int, after: int, tolerance: float = 1e-12
) -> tuple[GraphModule, Any]:
    """The pass leaves ``after`` calls of ``operator``; the graph computes what it did, twice is once."""

    def calls() -> int:
        return len(gm.graph.find_nodes(op="call_function", target=operator))

    gm = traced(function, *arguments)
    assert calls() == before
    result = joint_pass(gm.graph)
    assert result.matched == (after < before), result.reason
    gm.graph.lint()
    gm.recompile()
    assert calls() == after
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")
    for want, have in zip(function(*arguments), gm(*arguments), strict=True):
        assert want.shape == have.shape and want.dtype == have.dtype
        torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance)
    assert not joint_pass(gm.graph).matched
    return gm, result
