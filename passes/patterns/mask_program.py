"""The part of a graph that builds an attention mask, as a program that runs on the CPU for any sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate, map_arg

from cggr_compile import compat
from cggr_compile.passes.analysis.effects import Memory, memory, mutated_operands, overlap
from cggr_compile.passes.fx import in_order
from cggr_compile.passes.nodes import fake_value, op_name

Sizes = Mapping[Any, int]  # sympy symbol -> size

# Most bytes of tensors alive at once during one evaluation.
MEMORY_LIMIT = 3 << 30

# These read only the dtype, and maybe the shape, of their first argument.
_METADATA_ONLY = ("new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like")


class Undecided(Exception):
    """The mask cannot be computed, or not be classified; the message says why.

    ``kind`` is ``data`` when it depends on what the graph is fed, else ``unknown``.
    """

    def __init__(self, reason: str, kind: str = "unknown") -> None:
        super().__init__(reason)
        self.kind = kind


class TooLarge(Undecided):
    """The mask takes too much memory to compute."""


@dataclass(frozen=True)
class MaskProgram:
    """The nodes that compute a mask, in graph order, in-place writes included.

    Attributes:
        mask: the node of the result.
        nodes: what to run; nodes that are sizes are numbers to fill in, whatever they are computed from.
        inputs: tensor placeholders and graph attributes among them.
        symbols: every symbol of the graph's input shapes, with a SymInt that is exactly it.
        instead: a fixed length, and the one that stands for it wherever the program writes it; see ``at_length``.
    """

    mask: Node
    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    symbols: Mapping[Any, torch.SymInt]
    instead: tuple[int, int] | None = None

    @classmethod
    def of(cls, mask: Node, uses: Sequence[Node]) -> MaskProgram:
        """The program of ``mask`` as it is when ``uses`` (attention nodes) read it."""
        order = {node: i for i, node in enumerate(mask.graph.nodes)}
        first, last = min(order[use] for use in uses), max(order[use] for use in uses)
        writes = [
            (node, target) for node in mask.graph.nodes if order[node] < last for target in mutated_operands(node)
        ]
        found: set[Node] = set()
        todo = [mask]
        while todo:
            while todo:
                node = todo.pop()
                if node not in found:
                    found.add(node)
                    todo.extend(_inputs(node))
            shared: Memory = frozenset().union(*(memory(node) or () for node in found))
            inside = (w for w, target in writes if target in found or overlap(memory(target), shared))
            todo = [w for w in inside if w not in found]
            late = [w for w in todo if order[w] > first]
            if late:
                raise Undecided(f"{late[0].name} changes it in place between two attentions")
        nodes = tuple(in_order(mask.graph, found))
        inputs = tuple(n for n in nodes if n.op in ("placeholder", "get_attr") and not _is_size(n))
        return cls(mask, nodes, inputs, _symbols(mask.graph))

    def at_length(self, fixed: int, other: int) -> MaskProgram:
        """The same program with ``other`` for every number that is ``fixed``, sizes of inputs as well."""
        return replace(self, instead=(fixed, other))

    def fit(self, value: Any) -> Any:
        """Numbers as this program has them: nested ones, and bounds of slices."""
        if self.instead is None:
            return value
        fixed, other = self.instead
        return map_aggregate(value, lambda v: other if type(v) is int and v == fixed else v)

    def largest_constant(self, apart: int | None = None) -> int:
        """The largest number written in the program: where its behaviour may last change. Fill values do not count,
        nor does ``apart``."""
        numbers = [0.0]

        def see(value: Any) -> Any:
            fill = 65000.0 if isinstance(value, float) else 2.0**31  # an integer that large is the end of a slice
            if type(value) in (int, float) and abs(value) < fill and not (type(value) is int and value == apart):
                numbers.append(abs(value))
            return value

        for node in self.nodes:
            value = fake_value(node)
            if not _is_size(node):
                map_aggregate((node.args, dict(node.kwargs)), see)
            elif isinstance(value, torch.SymInt):
                numbers.extend(abs(int(atom)) for atom in value.node.expr.atoms() if atom.is_Integer)
            elif isinstance(value, int):
                see(value)
        return math.ceil(max(numbers))

    def run(self, sizes: Sizes, feeds: Mapping[Node, Tensor]) -> Tensor:
        """The mask for these sizes and input tensors, on the CPU.

        A dry run on the meta device comes first, so that nothing is allocated that does not fit.

        Raises:
            Undecided: an operator failed, or the mask is random.
            TooLarge: it takes too much memory.
        """
        state = torch.get_rng_state()
        self._run("meta", sizes, {node: feed.to("meta") for node, feed in feeds.items()})
        value = self._run("cpu", sizes, {node: feed.clone() for node, feed in feeds.items()})
        if not torch.equal(state, torch.get_rng_state()):
            torch.set_rng_state(state)
            raise Undecided("it is random")
        return value

    def _run(self, device: str, sizes: Sizes, feeds: Mapping[Node, Tensor]) -> Tensor:
        values: dict[Node, Any] = {}
        last_user = {arg: node for node in self.nodes for arg in node.all_input_nodes}
        with torch.no_grad(), torch.device(device):
            for node in self.nodes:
                if _is_size(node):
                    values[node] = self.fit(concrete(fake_value(node), sizes))
                elif node in feeds:
                    values[node] = feeds[node]
                else:
                    values[node] = self._call(node, values, device, sizes)
                if device == "meta":
                    _check_memory(values.values(), node)
                for arg in node.all_input_nodes:
                    if last_user[arg] is node and arg is not self.mask:
                        values.pop(arg, None)
        result = values[self.mask]
        if not isinstance(result, Tensor):
            raise Undecided(f"{self.mask.name} is not a tensor")
        return result

    def _call(self, node: Node, values: Mapping[Node, Any], device: str, sizes: Sizes) -> Any:
        if node.op not in ("call_function", "call_method"):
            raise Undecided(f"it depends on {node.name}", "data")
        args, kwargs = map_arg(self.fit((node.args, dict(node.kwargs))), lambda n: values.get(n))
        name = op_name(node)
        if name in _METADATA_ONLY and node.args and isinstance(node.args[0], Node):
            like = fake_value(node.args[0])
            args = (torch.empty((), dtype=like.dtype).expand(self.fit(concrete(like.shape, sizes))), *args[1:])
        if name in ("cpu", "cuda"):
            return args[0]
        names = name == "to"
        args = tuple(_moved(arg, device, names) for arg in args)
        kwargs = {k: _moved(v, device, names or k == "device") for k, v in kwargs.items()}
        function: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
        try:
            return function(*args, **kwargs)
        except Exception as error:  # someone else's operator: whatever it raises is the reason
            text = str(error).strip().split("\n")[0][:120]
            raise Undecided(f"{node.name} ({name}) could not be computed: {type(error).__name__}: {text}") from error


def concrete(value: Any, sizes: Sizes) -> Any:
    """A size, or nested sizes, with the symbols replaced. Adds no guard."""
    if isinstance(value, (tuple, list)):
        return tuple(concrete(item, sizes) for item in value)
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    expression = value.node.expr
    unknown = expression.free_symbols - sizes.keys()
    if unknown:
        raise Undecided(f"it depends on {min(map(str, unknown))}, which is not an input's size", "data")
    number = expression.subs(dict(sizes))
    kind = int if isinstance(value, torch.SymInt) else float if isinstance(value, torch.SymFloat) else bool
    return kind(number)


def _is_size(node: Node) -> bool:
    """Numbers and shapes: known from the sizes alone."""
    value = fake_value(node)
    numbers = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(value, numbers) or (isinstance(value, tuple) and all(isinstance(v, numbers) for v in value))


def _inputs(node: Node) -> Sequence[Node]:
    """The nodes whose values ``node`` needs: none for a size, not the tensor whose dtype is copied."""
    if _is_size(node):
        return ()
    if op_name(node) in _METADATA_ONLY and node.args:
        found: list[Node] = []
        map_arg((node.args[1:], dict(node.kwargs)), found.append)
        return found
    return node.all_input_nodes


def _symbols(graph: Graph) -> dict[Any, torch.SymInt]:
    found: dict[Any, torch.SymInt] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = fake_value(node)
        for size in (*value.shape,) if isinstance(value, Tensor) else (value,):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.hint is not None:
                found[size.node.expr] = size
    return found


def _moved(value: Any, device: str, strings: bool) -> Any:
    """``value``, or ``device`` if it is one (by name only where strings are device names)."""
    if isinstance(value, torch.device) or (strings and isinstance(value, str)):
        return torch.device(device)
    return value


def _check_memory(values: Iterable[Any], node: Node) -> None:
    tensors = [compat.unwrapped(value) for value in values if isinstance(value, Tensor)]
    used = sum({compat.storage_id(t): t.untyped_storage().nbytes() for t in tensors}.values())
    if used > MEMORY_LIMIT:
        raise TooLarge(f"computing it takes {used / 2**30:.1f} GiB at {node.name}, too much to check")
