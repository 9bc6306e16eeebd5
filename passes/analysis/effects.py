"""What a call does besides computing its value: the memory it writes to, the random numbers it draws."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from cggr_compile import compat
from cggr_compile.passes.nodes import argument, fake_value, op_name


def mutated_operand(node: Node) -> Node | None:
    """The (first) tensor a call writes into, if it writes into any; see :func:`mutated_operands`."""
    return next(iter(mutated_operands(node)), None)


def mutated_operands(node: Node) -> list[Node]:
    """The tensors a call writes into: ``x.add_()``, ``x += y``, ``x[i] = y``, ``relu(x, inplace=True)``, ``out=x``.

    Lists of them too (``torch._foreach_add_``), the arguments that an operator's schema says are written, and all
    inputs of a Triton kernel or of a body that writes to its inputs.
    """
    if node.op not in ("call_function", "call_method"):
        return []
    target: Any = node.target
    first = node.args[:1]
    if node.op == "call_method":
        name = str(target)
        suffix = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        return _nodes(first) if suffix or getattr(operator, name, None) in _WRITING_OPERATORS else []
    if isinstance(target, compat.HigherOrderOperator):
        return list(node.all_input_nodes) if _body_writes(node) else []
    if isinstance(target, (compat.OpOverload, compat.OpOverloadPacket)):
        return _nodes(_written_arguments(node))
    name = getattr(target, "__name__", "")
    suffix = name.endswith("_") and not name.endswith("__") and getattr(target, "__module__", "") != "_operator"
    writes = suffix or target in _WRITING_OPERATORS or _inplace_flag(node)
    return list(dict.fromkeys([*_nodes(node.kwargs.get("out")), *_nodes(first if writes else ())]))


def _nodes(arguments: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(arguments, found.append)
    return list(dict.fromkeys(found))


def _written_arguments(node: Node) -> list[Any]:
    """The arguments that an operator's schema says it writes to: of every overload where none is named."""
    found = []
    for overload in _overloads(node.target):
        for i, spec in enumerate(compat.schema(overload).arguments):
            if spec.alias_info is not None and spec.alias_info.is_write:
                found.append(node.args[i] if i < len(node.args) else node.kwargs.get(spec.name))
    return found


def bodies(node: Node) -> list[Graph]:
    """The graphs that a higher-order operator is given."""
    owner = node.graph.owning_module
    attributes = [n for n in node.all_input_nodes if n.op == "get_attr"]
    held = [getattr(owner, str(attribute.target), None) for attribute in attributes]
    return [body.graph for body in held if isinstance(body, GraphModule)]


def _body_writes(node: Node) -> bool:
    if op_name(node).startswith("triton_kernel_wrapper_mutation"):
        return True
    for body in bodies(node):
        inputs = [memory(n) for n in body.find_nodes(op="placeholder")]
        written = [memory(operand) for inner in body.nodes for operand in mutated_operands(inner)]
        if any(overlap(one, other) for one in written for other in inputs):
            return True
    return False


Memory = frozenset[int] | None


def memory(node: Node) -> Memory:
    """Numbers of the storages behind a node's tensors, which its views share; None where that cannot be told."""
    found: set[int] = set()
    value = fake_value(node)
    for tensor in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(tensor, torch.Tensor):
            try:
                found.add(compat.storage_id(tensor))
            except (NotImplementedError, RuntimeError):  # a wrapper subclass
                return None
    return frozenset(found)


def overlap(one: Memory, other: Memory) -> bool:
    """Whether a write to one may be seen in the other."""
    if one is None or other is None:
        return one != frozenset() and other != frozenset()
    return not one.isdisjoint(other)


def draws(node: Node) -> bool:
    """Whether a call draws random numbers."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, compat.HigherOrderOperator):
        return any(draws(inner) for body in bodies(node) for inner in body.nodes)
    name = op_name(node).partition(".")[0]
    if name == "scaled_dot_product_attention":
        return bool(argument(node, 4, "dropout_p", 0.0))
    if "dropout" in name:
        return bool(argument(node, 1, "p", 0.5)) and argument(node, 2, "training", True) is not False
    if name == "rrelu":
        return argument(node, 3, "training", False) is not False
    target: Any = node.target
    if not isinstance(target, (compat.OpOverload, compat.OpOverloadPacket)):
        target = getattr(torch.ops.aten, name, None)
    tagged = any(torch.Tag.nondeterministic_seeded in overload.tags for overload in _overloads(target))
    return name in _RANDOM or tagged


def _overloads(target: Any) -> list[compat.OpOverload]:
    if isinstance(target, compat.OpOverloadPacket):
        return [getattr(target, name) for name in target.overloads()]
    return [target] if isinstance(target, compat.OpOverload) else []


_RANDOM = {"gumbel_softmax", "uniform", "random", "exponential", "cauchy", "geometric", "log_normal"}


def _inplace_flag(node: Node) -> bool:
    """Whether a call passes ``inplace=True``, by name or by position."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    position = inplace_position(node.target)
    return position is not None and bool(argument(node, position, "inplace", False))


def inplace_position(function: Any) -> int | None:
    """Where a function takes its ``inplace`` flag, or None if it has none."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        return None
    return names.index("inplace") if "inplace" in names else None


_WRITING_OPERATORS = {
    *(operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul, operator.itruediv),
    *(operator.ifloordiv, operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul),
    *(operator.ilshift, operator.irshift),
}
