"""Graphs with collectives, traced and run for all processes side by side in this one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

WORLD, GROUP = 2, "0"
functional = torch.ops._c10d_functional


def gather(shard: Tensor) -> Tensor:
    return functional.wait_tensor(functional.all_gather_into_tensor(shard, WORLD, GROUP))


def scatter(grad: Tensor, reduction: str = "avg") -> Tensor:
    return functional.wait_tensor(functional.reduce_scatter_tensor(grad, reduction, WORLD, GROUP))


def reduce(grad: Tensor) -> Tensor:
    return functional.wait_tensor(functional.all_reduce(grad, "avg", GROUP))


def traced(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    return make_fx(function, tracing_mode="fake")(*inputs)


def count(gm: GraphModule, operator: str) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=getattr(functional, operator).default))


def names(gm: GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes]


def run(gm: GraphModule, inputs: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """What each process's graph returns; every collective is done for all of them at once.

    Args:
        inputs: of each process.
    """
    values: list[dict[Node, Any]] = [
        dict(zip(gm.graph.find_nodes(op="placeholder"), mine, strict=True)) for mine in inputs
    ]
    for node in gm.graph.nodes:
        if node.op == "call_function":
            arguments = [map_arg((node.args, node.kwargs), one.__getitem__) for one in values]
            results = _together(node, [args for args, _ in arguments])
            if results is None:
                results = [node.target(*args, **kwargs) for args, kwargs in arguments]
            for one, result in zip(values, results, strict=True):
                one[node] = result
    return [list(map_arg(gm.graph.output_node().args[0], one.__getitem__)) for one in values]


def _together(node: Node, arguments: list[Any]) -> list[Tensor] | None:
    tensors = [args[0] for args in arguments]
    if node.target is functional.wait_tensor.default:
        return tensors
    if node.target is functional.all_gather_into_tensor.default:
        return [torch.cat(tensors)] * WORLD
    if node.target is functional.all_reduce.default:
        return [sum(tensors) / WORLD] * WORLD
    if node.target is functional.reduce_scatter_tensor.default:
        return list((sum(tensors) / WORLD).chunk(WORLD))
    return None
