"""Reading the calls of a graph: an operator's bare name, an argument by position or name."""

from __future__ import annotations

from typing import Any

from torch.fx import Node


def op_name(node: Node) -> str:
    """The operator's bare name, the same for ``x.add(y)``, ``x + y``, ``torch.add`` and ``x += y``."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", str(node.target))
    else:
        return node.op
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
