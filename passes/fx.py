"""Small FX helpers: reading nodes, following dataflow, inserting nodes with their fake values."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from cggr_compile import compat
from cggr_compile.passes.base import fake_value, shape_of
from cggr_compile.passes.modes import Modes, modes_of

if TYPE_CHECKING:
    from collections.abc import Iterator


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
    if isinstance(target, HigherOrderOperator):
        return list(node.all_input_nodes) if _body_writes(node) else []
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
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
        for i, spec in enumerate(overload._schema.arguments):
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
    if isinstance(node.target, HigherOrderOperator):
        return any(draws(inner) for body in bodies(node) for inner in body.nodes)
    name = op_name(node).partition(".")[0]
    if name == "scaled_dot_product_attention":
        return bool(argument(node, 4, "dropout_p", 0.0))
    if "dropout" in name:
        return bool(argument(node, 1, "p", 0.5)) and argument(node, 2, "training", True) is not False
    if name == "rrelu":
        return argument(node, 3, "training", False) is not False
    target: Any = node.target
    if not isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        target = getattr(torch.ops.aten, name, None)
    tagged = any(torch.Tag.nondeterministic_seeded in overload.tags for overload in _overloads(target))
    return name in _RANDOM or tagged


def _overloads(target: Any) -> list[torch._ops.OpOverload]:
    if isinstance(target, torch._ops.OpOverloadPacket):
        return [getattr(target, name) for name in target.overloads()]
    return [target] if isinstance(target, torch._ops.OpOverload) else []


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


def descendants(roots: Iterable[Node], stop: Iterable[Node] = ()) -> set[Node]:
    """Nodes computed from ``roots`` (inclusive), not looking past ``stop``."""
    found: set[Node] = set()
    halt = set(stop)
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node in found:
            continue
        found.add(node)
        if node not in halt:
            todo.extend(node.users)
    return found


def ancestors(roots: Iterable[Node]) -> set[Node]:
    """Nodes that ``roots`` are computed from (inclusive)."""
    found: set[Node] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def in_order(graph: Graph, nodes: set[Node] | frozenset[Node]) -> list[Node]:
    return [node for node in graph.nodes if node in nodes]


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


def sort_stably(graph: Graph) -> None:
    """Put every node behind its inputs again, otherwise keeping the order."""
    placed: set[Node] = set()
    waiting: dict[Node, list[Node]] = {}
    todo = list(reversed(graph.nodes))
    end = graph._root  # a node, behind which the first one goes
    while todo:
        node = todo.pop()
        missing = next((source for source in node.all_input_nodes if source not in placed), None)
        if missing is not None:
            waiting.setdefault(missing, []).append(node)
            continue
        end.append(node)
        end = node
        placed.add(node)
        todo.extend(reversed(waiting.pop(node, [])))
    if waiting:
        raise ValueError(f"a cycle through {next(iter(waiting))}")


class Emitter:
    """Inserts calls before an anchor and records their fake values, so that later passes can read shapes."""

    def __init__(self, graph: Graph, fake_mode: Any, key: str = "example_value") -> None:
        self.graph = graph
        self.fake_mode = fake_mode
        self.key = key
        self.origin: dict[str, Any] = {}
        self._places: dict[Node, Modes] = {}
        self._modes: Modes | None = None

    @contextmanager
    def before(self, anchor: Node, origin: str) -> Iterator[Emitter]:
        """Insert in front of ``anchor``; ``origin`` names the pass in the dumped graph's comments."""
        self.origin = {"stack_trace": f'File "cggr_compile/passes", line 0, in {origin}\n    {origin}'}
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


def layout_only(node: Node) -> bool:
    """Views that merge or split leading axes and leave the last one alone, and copies."""
    name = op_name(node)
    if name in ("contiguous", "clone"):
        return True
    if name not in ("view", "reshape"):
        return False
    old, new = shape_of(node.all_input_nodes[0]), shape_of(node)
    return bool(old) and bool(new) and old[-1] == new[-1]
