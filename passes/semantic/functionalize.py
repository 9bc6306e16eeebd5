"""Turns in-place operations on intermediate values into ordinary ones, so that dataflow tells the whole story."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from cggr_compile.passes.analysis.effects import inplace_position, memory, mutated_operand, mutated_operands, overlap
from cggr_compile.passes.analysis.modes import Modes, modes_of
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value, op_name, same_size, shape_of

if TYPE_CHECKING:
    from torch.fx import Graph, GraphModule


class Functionalize(SemanticPass):
    """Replaces in-place operations whose old value nobody reads any more.

    Before::

        x += attention(x)
        y = norm(x)

    After::

        x1 = x + attention(x)
        y = norm(x1)

    An empty tensor that is filled part by part along one axis (the keys of DeepSeek-V3) becomes a ``cat``::

        k = empty(...); k[..., :8].copy_(a); k[..., 8:].copy_(b)   # before
        k = cat([a, b], -1)                                        # after

    and a tensor assigned to a part that numbers name (the steps or chunks of a recurrence) makes a new value::

        y[:, 0] = a                          # before
        y1 = y.select_scatter(a, 1, 0)       # after

    Left alone, because they are effects or their aliases matter: writes to graph inputs (buffers), through views,
    and into other parts (``x[mask] = 0``). ``find_stack`` refuses graphs in which such a write touches the stream.
    """

    name = "functionalize"
    optional = True

    def enabled(self, ctx: GraphContext) -> bool:
        return True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        emit = Emitter(gm.graph, ctx.fake_mode)
        modes = modes_of(gm.graph)
        replaced = [f"{node} (filled by parts)" for node in list(gm.graph.nodes) if _join(emit, node, modes)]
        for node in list(gm.graph.nodes):
            if mutated_operand(node) is not None and not modes[node].levels and _replace(emit, node):
                replaced.append(f"{node} ({op_name(node)})")
        if not replaced:
            return PassResult(False, "no in-place operation to replace")
        return PassResult(True, f"{len(replaced)} in-place operations replaced", {"operations": replaced})


def _replace(emit: Emitter, node: Node) -> bool:
    graph = emit.graph
    target, *others = mutated_operands(node)
    if others:
        return False
    if node.target is operator.setitem:
        return _assign(emit, node, target)
    twin = _out_of_place(node)
    if twin is None or not isinstance(fake_value(node), torch.Tensor) or _seen_elsewhere(graph, target, node):
        return False
    kind, function, args, kwargs = twin
    with emit.before(node, Functionalize.name):
        new = (emit.method if kind == "call_method" else emit.call)(function, *args, **kwargs)
    new.meta = {**node.meta, emit.key: new.meta[emit.key]}
    if not _alike(new, node):
        graph.erase_node(new)
        return False
    _renew(target, node, new)
    return True


def _alike(new: Node, old: Node) -> bool:
    """Writing in place also casts, and under no_grad leaves the gradient as it is."""
    was, now = fake_value(old), fake_value(new)
    return bool((now.dtype, now.shape, now.requires_grad) == (was.dtype, was.shape, was.requires_grad))


def _seen_elsewhere(graph: Graph, target: Node, node: Node) -> bool:
    """Whether somebody else sees what ``node`` writes to ``target``: the caller, or who reads it by another name."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    here = order[node]
    for alias in _aliases(graph, target):
        if alias.op == "placeholder":
            return True
        if alias is not target and order[alias] < here and any(order[user] > here for user in alias.users):
            return True
    return False


def _renew(target: Node, node: Node, new: Node) -> None:
    """Let ``new`` stand for ``target`` behind ``node``, which wrote to it, and for the value of that call."""
    for user in list(target.users):
        if user > node:
            user.replace_input_with(target, new)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _assign(emit: Emitter, node: Node, target: Node) -> bool:
    """``target[part] = value``, for a tensor of the part's shape, as a new value of the target."""
    index, value = node.args[1:]
    numbers = _numbers(index, shape_of(target))
    if not numbers or not isinstance(value, Node) or not fake_value(target).is_floating_point():
        return False
    if _seen_elsewhere(emit.graph, target, node):
        return False
    before = node.prev
    with emit.before(node, Functionalize.name):
        parts = [target]
        for axis, at in numbers:
            parts.append(emit.method("select", parts[-1], axis, at))
        fits = _same_shape(value, parts[-1])
        new = value
        for (axis, at), whole in reversed([*zip(numbers, parts, strict=False)]) if fits else ():
            new = emit.method("select_scatter", whole, new, axis, at)
    if not fits or not _alike(new, target):
        while node.prev is not before:
            emit.graph.erase_node(node.prev)
        return False
    new.meta = {**node.meta, emit.key: new.meta[emit.key]}
    _renew(target, node, new)
    return True


def _same_shape(one: Node, other: Node) -> bool:
    shapes = shape_of(one), shape_of(other)
    return len(shapes[0]) == len(shapes[1]) and all(map(same_size, *shapes))


def _numbers(index: Any, shape: tuple[Any, ...]) -> list[tuple[int, int]]:
    """(axis, number) of every ``select`` that ``x[index]`` is, one after the other; none if it is anything else."""
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, Node) for part in index) or sum(part is Ellipsis for part in index) > 1:
        return []
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (len(shape) - len(index) + 1), *index[at + 1 :])
    found: list[tuple[int, int]] = []
    for axis, (part, size) in enumerate(zip(index, shape, strict=False)):
        if isinstance(part, int) and not isinstance(part, bool) and isinstance(size, int):
            found.append((axis - len(found), part % size))
        elif part != slice(None):
            return []
    return found


_EMPTY = ("empty", "new_empty", "empty_like")


def _join(emit: Emitter, base: Node, modes: dict[Node, Modes]) -> bool:
    """Replace an empty tensor, and the copies that fill its parts side by side, by the parts' concatenation."""
    if op_name(base) not in _EMPTY or not isinstance(fake_value(base), torch.Tensor):
        return False
    graph = emit.graph
    views: list[tuple[int, int, int, Node]] = []  # axis, begin, end, the copy into that part
    users = sorted(base.users)
    for view in users:
        part = _slice(view)
        if part is None or len(view.users) != 1:
            break
        (write,) = view.users
        if op_name(write) != "copy" or mutated_operand(write) is not view or len(write.args) != 2 or write.users:
            break
        views.append((*part, write))
    if not views:
        return False
    readers = users[len(views) :]
    writes = {write for *_, write in views}
    last = max(writes)
    between = (n for n in graph.nodes if min(writes) < n < last and n not in writes)
    if any(mutated_operand(n) is not None for n in between) or len({modes[write] for write in writes}) > 1:
        return False  # what was copied may change before the end, or some of it has no gradient
    views.sort(key=lambda view: view[1])
    axis, shape = views[0][0], fake_value(base).shape
    edges = [0, *(end for _, _, end, _ in views)]
    side_by_side = all(at == axis and begin == edge for (at, begin, _, _), edge in zip(views, edges, strict=False))
    if not side_by_side or edges[-1] != shape[axis] or any(user < last for user in readers):
        return False
    sources: list[Any] = [write.args[1] for *_, write in views]
    if any(
        not isinstance(source, Node) or fake_value(source).shape != fake_value(write.args[0]).shape
        for source, (*_, write) in zip(sources, views, strict=True)
    ):
        return False  # a number, or a part that is spread out
    with emit.before(last, Functionalize.name):
        dtype = fake_value(base).dtype  # which copying casts to
        parts = [s if fake_value(s).dtype == dtype else emit.method("to", s, dtype) for s in sources]
        joined = emit.call(torch.cat, parts, axis)
    joined.meta = {**base.meta, emit.key: joined.meta[emit.key]}
    for user in readers:
        user.replace_input_with(base, joined)
    for *_, write in views:
        part_of: Any = write.args[0]
        graph.erase_node(write)
        graph.erase_node(part_of)
    graph.erase_node(base)
    return True


def _slice(view: Node) -> tuple[int, int, int] | None:
    """(axis, begin, end) of ``base[..., begin:end]`` with numbers and one sliced axis; else None."""
    if view.target is not operator.getitem or not isinstance(view.args[0], Node):
        return None
    index: Any = view.args[1] if isinstance(view.args[1], tuple) else (view.args[1],)
    shape = fake_value(view.args[0]).shape
    if index.count(Ellipsis) > 1 or not all(i is Ellipsis or isinstance(i, slice) for i in index):
        return None
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (len(shape) - len(index) + 1), *index[at + 1 :])
    cut = [axis for axis, part in enumerate(index) if part != slice(None)]
    if len(cut) != 1 or not isinstance(shape[cut[0]], int):
        return None
    part = index[cut[0]]
    if part.step not in (None, 1) or not all(end is None or isinstance(end, int) for end in (part.start, part.stop)):
        return None
    begin, end, _ = part.indices(shape[cut[0]])
    return cut[0], begin, end


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
    own = memory(target)
    return [node for node in graph.nodes if overlap(memory(node), own)]


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
