"""Reading the nodes of a graph: an operator's bare name, an argument, a shape, the module that computes it."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node


def op_name(node: Node) -> str:
    """The operator's bare name, the same for ``x.add(y)``, ``x + y``, ``torch.add`` and ``x += y``."""
    return bare_name(node.op, node.target)


def bare_name(op: str, target: Any) -> str:
    """The bare name of what a node of this kind calls; the kind itself of other nodes."""
    if op == "call_method":
        name = str(target)
    elif op in ("call_function", "inline"):
        name = getattr(target, "__name__", str(target))
    else:
        return op
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
    return _ALIASES.get(name, name.rstrip("_") if not name.startswith("_") else name)


_ALIASES = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div", "divide": "div"} | {
    "multiply": "mul",
    "concat": "cat",
    "mm": "matmul",
    "flatten": "reshape",
    "unflatten": "reshape",
    "_softmax": "softmax",
}


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def shape_of(node: Any) -> tuple[Any, ...]:
    """Shape of a node's (fake) tensor; sizes are ints or SymInts. Empty for non-tensors."""
    value = fake_value(node)
    return tuple(value.shape) if hasattr(value, "shape") else ()


def fake_value(node: Any) -> Any:
    """The fake tensor that the capture recorded for a node (Dynamo: example_value, AOTAutograd: val)."""
    return node.meta.get("example_value", node.meta.get("val"))


def differentiable(node: Any) -> bool:
    """Whether a gradient flows into a node's value, a tensor or several."""
    value = fake_value(node)
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def module_of(node: Node) -> str:
    """Path of the innermost module that computes a node, such as model.layers.0.mlp; empty where there is none."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return ".".join(paths[-1].split(".")[1:]) if paths else ""


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are statically the same number, without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    left, right = getattr(getattr(a, "node", None), "expr", a), getattr(getattr(b, "node", None), "expr", b)
    return bool(left == right)
