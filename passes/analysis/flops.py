"""Counts the arithmetic of a captured forward pass: its products with weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate, map_arg
from torch.utils.flop_counter import FlopCounterMode

from cggr_compile.passes.fx import is_static
from cggr_compile.passes.nodes import argument, fake_value, op_name, shape_of
from cggr_compile.passes.patterns import quantised
from cggr_compile.passes.patterns.experts import GROUPED

if TYPE_CHECKING:
    from torch.fx import Graph, Node

# Products whose factors may be weights, by the names of functions and of methods; attention is none of them.
PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "einsum", "tensordot", "bilinear"}
CONVOLUTIONS = {"conv1d", "conv2d"}
EXPERTS = {"moe", "moe_clamped"}


def weight_flops(graph: Graph) -> int:
    """Floating-point operations of the products that a weight is a factor of; an addition counts as one as well.

    Experts count with the rows that are routed to them, and products of symbolic sizes not at all. Of an autograd
    function the forward counts.
    """
    weights: set[Node] = set()
    total = 0
    for node in graph.nodes:
        if _is_weight(node, weights):
            weights.add(node)
        elif quantised.is_quantised_product(node):
            total += quantised.flops(node) if is_static(node) else 0
        elif op_name(node) == "autograd_function_apply":
            body: Any = node.args[0]
            total += weight_flops(getattr(graph.owning_module, str(body.target)).graph)
        elif node.op in ("call_function", "call_method") and not weights.isdisjoint(node.all_input_nodes):
            total += _flops(node) if is_static(node, *node.all_input_nodes) else 0
    return total


def _is_weight(node: Node, weights: set[Node]) -> bool:
    """A matrix among the graph's inputs, or what is computed from one such alone, as views and casts are."""
    if node.op in ("placeholder", "get_attr"):
        value: Any = fake_value(node)
        return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2
    return len(node.all_input_nodes) == 1 and node.all_input_nodes[0] in weights


def _flops(node: Node) -> int:
    name = op_name(node).removesuffix(".default")
    if name in GROUPED:  # [rows, K] x [experts, K, N], of which PyTorch's counter knows nothing
        return 2 * int(math.prod(shape_of(node))) * int(shape_of(argument(node, 0, "input"))[-1])
    if name in EXPERTS:
        return _flops_of_experts(node, clamped=name == "moe_clamped")
    if name not in PRODUCTS | CONVOLUTIONS:
        return 0
    # On tensors without data, of one type: under autocast a graph's factors may be of two.
    args, kwargs = map_aggregate(map_arg((node.args, node.kwargs), fake_value), _on_meta)
    function: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return int(counter.get_total_flops())


def _on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return torch.empty_strided(value.shape, value.stride(), dtype=dtype, device="meta")


def _flops_of_experts(node: Node, clamped: bool) -> int:
    places = (1, 3, 6) if clamped else (1, 2, 4)  # with biases in between
    names = ("gate_up", "down", "experts")
    gate_up, down, chosen = (shape_of(argument(node, place, name)) for place, name in zip(places, names, strict=True))
    flops: int = 2 * math.prod(chosen) * (math.prod(gate_up[1:]) + math.prod(down[1:]))
    return flops
