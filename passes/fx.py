"""Small FX helpers: reading nodes, following dataflow, inserting nodes with their fake values."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer

from cggr_compile import compat
from cggr_compile.passes.analysis.modes import Modes, modes_of
from cggr_compile.passes.nodes import fake_value, op_name, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterator


def descendants(
    roots: Iterable[Node], stop: Iterable[Node] = (), only: Callable[[Node], bool] = lambda node: True
) -> set[Node]:
    """Nodes computed from ``roots`` (inclusive) by way of ``only`` such nodes, not looking past ``stop``."""
    return _reached(roots, lambda node: node.users, stop, only)


def ancestors(
    roots: Iterable[Node], stop: Iterable[Node] = (), only: Callable[[Node], bool] = lambda node: True
) -> set[Node]:
    """Nodes that ``roots`` are computed from (inclusive) by way of ``only`` such nodes, not looking past ``stop``."""
    return _reached(roots, lambda node: node.all_input_nodes, stop, only)


def _reached(
    roots: Iterable[Node],
    neighbours: Callable[[Node], Iterable[Node]],
    stop: Iterable[Node],
    only: Callable[[Node], bool],
) -> set[Node]:
    found: set[Node] = set()
    halt = set(stop)
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node not in found and only(node):
            found.add(node)
            if node not in halt:
                todo.extend(neighbours(node))
    return found


def in_order(graph: Graph, nodes: set[Node] | frozenset[Node]) -> list[Node]:
    return [node for node in graph.nodes if node in nodes]


def place_behind(node: Node) -> Node:
    """The first node behind ``node`` in front of which calls can be put: the graph's inputs come first."""
    place = node.next
    while place.op == "placeholder":
        place = place.next
    return place


def bottlenecks(ordered: Sequence[Node]) -> list[Node]:
    """Nodes of a sub-DAG, given in topological order, that every source-to-sink path goes through.

    A node is one exactly if no edge jumps over it: a path is monotone in the order, so it lands on the
    node or jumps over it; and an edge that jumps over it lies on a path from a source to a sink.
    Every node of ``ordered`` must be reachable from its first node and reach its last one.
    """
    position = {node: i for i, node in enumerate(ordered)}
    furthest = 0
    found = []
    for i, node in enumerate(ordered):
        if furthest <= i:
            found.append(node)
        furthest = max([furthest, *(position[user] for user in node.users if user in position)])
    return found


class Emitter:
    """Inserts calls before an anchor and records their fake values, so that later passes can read shapes."""

    def __init__(self, graph: Graph, fake_mode: Any, key: str = "example_value") -> None:
        self.graph = graph
        self.fake_mode = fake_mode
        self.key = key
        self.origin: dict[str, Any] = {}
        self._places: dict[Node, Modes] = {}
        self._modes: Modes | None = None
        self._tracer = _CallsOfProxies(self)

    @contextmanager
    def before(self, anchor: Node, origin: str) -> Iterator[Emitter]:
        """Insert in front of ``anchor``; ``origin`` names the pass in the dumped graph's comments.

        In an ATen graph what is inserted is of the module that ``anchor`` is of.
        """
        self.origin = {"stack_trace": f'File "cggr_compile/passes", line 0, in {origin}\n    {origin}'}
        if self.key != "example_value":
            self.origin |= {name: anchor.meta[name] for name in compat.MODULE_STACKS if name in anchor.meta}
        outer = self._modes
        if self.key == "example_value":  # an ATen graph has no modes
            if anchor not in self._places:
                self._places = modes_of(self.graph)
            self._modes = self._places[anchor]
        try:
            with self.graph.inserting_before(anchor):
                yield self
        finally:
            self._modes = outer

    @property
    def modes(self) -> Modes:
        """What nodes run in where they are inserted now (Dynamo graphs)."""
        assert self._modes is not None
        return self._modes

    @contextmanager
    def under(self, modes: Modes) -> Iterator[None]:
        """Insert under another grad mode and autocast: between nodes that enter and leave them, where they differ."""
        outer, entered = self.modes, []
        if modes.grad != outer.grad:
            self._switch(compat.SET_GRAD, modes.grad)
        for kind, enabled, dtype in modes.casts_unlike(outer):
            entered.append(self._switch(compat.ENTER_AUTOCAST, kind, dtype, enabled, None))
        self._modes = replace(outer, grad=modes.grad, casts=modes.casts)
        yield
        self._modes = outer
        for node in reversed(entered):
            self._switch(compat.EXIT_AUTOCAST, node)
        if modes.grad != outer.grad:
            self._switch(compat.SET_GRAD, outer.grad)

    def _switch(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        node.meta.update(self.origin)
        node.meta[self.key] = None
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        return self._annotate(node, target, args, kwargs)

    def method(self, name: str, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_method(name, args, kwargs)
        return self._annotate(node, getattr(torch.Tensor, name), args, kwargs)

    def item(self, node: Node, index: int) -> Node:
        return self.call(operator.getitem, node, index)

    def inline(self, module: GraphModule, *args: Any) -> Any:
        """The calls of a module's graph, with its inputs replaced; what it returns, as nodes."""
        return _Inline(module, self).run(*args)

    def trace(self, function: Callable[..., Any], *args: Node) -> Any:
        """The calls that a plain function of tensors makes (ATen graphs); what it returns, as nodes."""
        return self.inline(compat.traced(function, [fake_value(arg) for arg in args], self.fake_mode), *args)

    def proxy(self, value: Any) -> Any:
        """A node as an operand of plain Python, whose operations become calls (Dynamo graphs); numbers as they are."""
        return self._tracer.proxy(value) if isinstance(value, Node) else value

    def node(self, proxy: Any) -> Node:
        """What :meth:`proxy` was made from, or what has become of it."""
        return self._tracer.create_arg(proxy)  # type: ignore[return-value]

    def masked(self, mask: Node, values: Node) -> Node:
        """``values``, with zeros where ``mask`` is False (ATen graphs)."""
        value = fake_value(values)
        zero = self.call(torch.ops.aten.full.default, [], 0.0, dtype=value.dtype, device=value.device)
        return self.call(torch.ops.aten.where.self, mask, values, zero)

    def shaped(self, node: Node, shape: Sequence[int]) -> Node:
        """``node`` viewed in ``shape``, if it has another (ATen graphs)."""
        return node if shape_of(node) == tuple(shape) else self.call(torch.ops.aten.view.default, node, list(shape))

    def size(self, node: Node, axis: int) -> int | Node:
        """A size as a number where it is static, else as a node."""
        size = shape_of(node)[axis]
        return size if isinstance(size, int) else self.call(torch.ops.aten.sym_size.int, node, axis)

    def integer(self, function: Callable[..., int], *operands: int | Node) -> int | Node:
        """Arithmetic on sizes: a number where they are static, else a node."""
        if all(isinstance(operand, int) for operand in operands):
            return function(*operands)
        return self.call(function, *operands)

    def minus(self, left: int | Node, right: int | Node) -> int | Node:
        return self.integer(operator.sub, left, right)

    def changed(self, node: Node) -> None:
        """The arguments of a call of a function are others now."""
        function: Any = node.target
        self._evaluate(node, function, node.args, node.kwargs)

    def copy(self, node: Node, mapping: dict[Node, Node]) -> Node:
        """A copy of ``node`` with its inputs replaced."""
        clone = self.graph.node_copy(node, lambda n: mapping.get(n, n))
        clone.meta = {k: v for k, v in node.meta.items() if k != self.key}
        function: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
        self._evaluate(clone, function, clone.args, clone.kwargs)
        return clone

    def _annotate(self, node: Node, function: Callable[..., Any], args: Any, kwargs: Any) -> Node:
        node.meta.update(self.origin)
        self._evaluate(node, function, args, kwargs)
        return node

    def _evaluate(self, node: Node, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        fake_args, fake_kwargs = map_arg((args, kwargs), fake_value)
        modes = nullcontext() if self._modes is None else self._modes.applied()
        with self.fake_mode, compat.symbolic_sizes_kept(self.fake_mode), modes:
            node.meta[self.key] = function(*fake_args, **fake_kwargs)


class _CallsOfProxies(GraphAppendingTracer):
    """Makes what is done with the proxies of an emitter's nodes into calls of the emitter."""

    def __init__(self, emit: Emitter) -> None:
        super().__init__(emit.graph)
        self.emit = emit

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None
    ) -> Node:
        return (self.emit.method if kind == "call_method" else self.emit.call)(target, *args, **kwargs)


class _Inline(Interpreter):
    """Runs a graph on nodes instead of tensors: every call becomes one of the emitter's."""

    def __init__(self, module: GraphModule, emit: Emitter) -> None:
        super().__init__(module)
        self.emit = emit

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Node:
        return self.emit.call(target, *args, **kwargs)


def backward_of(graph: Graph) -> set[Node]:
    """The backward pass of a joint graph: what depends on a gradient."""
    return descendants(node for node in graph.find_nodes(op="placeholder") if "tangents" in node.name)


def is_static(*nodes: Node) -> bool:
    """Whether every size of these tensors is a number."""
    return all(isinstance(size, int) for node in nodes for size in shape_of(node))


def is_zeros(value: Any) -> bool:
    """Whether it is a tensor of zeros (ATen graphs)."""
    return bool(isinstance(value, Node) and value.target is torch.ops.aten.full.default and value.args[1] == 0)


def layout_only(node: Node) -> bool:
    """Views that merge or split leading axes and leave the last one alone, and copies."""
    name = op_name(node)
    if name in ("contiguous", "clone"):
        return True
    if name not in ("view", "reshape"):
        return False
    old, new = shape_of(node.all_input_nodes[0]), shape_of(node)
    return bool(old) and bool(new) and old[-1] == new[-1]
