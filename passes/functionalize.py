"""Turns in-place operations on intermediate values into ordinary ones, so that dataflow tells the whole story."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from cggr_compile import compat
from cggr_compile.passes.base import GraphContext, PassResult, fake_value
from cggr_compile.passes.fx import Emitter, inplace_position, mutated_operand, op_name

if TYPE_CHECKING:
    from torch.fx import Graph, GraphModule, Node


class Functionalize:
    """Replaces in-place operations whose old value nobody reads any more.

    Before::

        x += attention(x)
        y = norm(x)

    After::

        x1 = x + attention(x)
        y = norm(x1)

    Left alone, because they are effects or their aliases matter: writes to graph inputs (buffers), through views,
    and into parts (``x[mask] = 0``). ``find_stack`` refuses graphs in which such a write touches the stream.
    """

    name = "functionalize"
    required = False
    analysis = False

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        replaced = []
        for node in list(gm.graph.nodes):
            if mutated_operand(node) is not None and _replace(gm.graph, node, ctx.fake_mode):
                replaced.append(f"{node} ({op_name(node)})")
        if not replaced:
            return PassResult(False, "no in-place operation to replace")
        return PassResult(True, f"{len(replaced)} in-place operations replaced", {"operations": replaced})


def _replace(graph: Graph, node: Node, fake_mode: Any) -> bool:
    target = mutated_operand(node)
    twin = _out_of_place(node)
    if target is None or twin is None or not isinstance(fake_value(node), torch.Tensor):
        return False
    order = {n: i for i, n in enumerate(graph.nodes)}
    here = order[node]
    for alias in _aliases(graph, target):
        if alias.op == "placeholder":
            return False  # an effect that the caller sees
        if alias is not target and order[alias] < here and any(order[user] > here for user in alias.users):
            return False  # somebody reads the new value through another name
    kind, function, args, kwargs = twin
    emit = Emitter(graph, fake_mode)
    with emit.before(node, Functionalize.name):
        new = (emit.method if kind == "call_method" else emit.call)(function, *args, **kwargs)
    new.meta = {**node.meta, emit.key: new.meta[emit.key]}
    old, now = fake_value(node), fake_value(new)
    if (now.dtype, now.shape) != (old.dtype, old.shape):
        graph.erase_node(new)  # writing in place also casts
        return False
    for user in list(target.users):
        if order.get(user, -1) > here:
            user.replace_input_with(target, new)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return True


def _out_of_place(node: Node) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]] | None:
    """The call that computes the same value without writing it anywhere; None if there is no plain one."""
    args, kwargs = node.args, dict(node.kwargs)
    if node.op == "call_method":
        name = str(node.target)[:-1]
        return ("call_method", name, args, kwargs) if hasattr(torch.Tensor, name) else None
    target: Any = node.target
    if target in _OPERATORS:
        return "call_function", _OPERATORS[target], args, kwargs
    if kwargs.get("inplace"):
        return "call_function", target, args, {**kwargs, "inplace": False}
    name = getattr(target, "__name__", "")
    for home in (torch.nn.functional, torch):
        if name.endswith("_") and getattr(home, name, None) is target:
            function = getattr(home, name[:-1], None)
            return ("call_function", function, args, kwargs) if function is not None else None
    position = inplace_position(target)
    if position is not None and len(args) > position:
        return "call_function", target, (*args[:position], False, *args[position + 1 :]), kwargs
    return None


def _aliases(graph: Graph, target: Node) -> list[Node]:
    """Nodes whose (fake) tensor shares memory with the target's."""
    by_storage: dict[int, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        value = fake_value(node)
        if isinstance(value, torch.Tensor):
            by_storage[compat.storage_id(value)].append(node)
    return by_storage[compat.storage_id(fake_value(target))]


_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
}
