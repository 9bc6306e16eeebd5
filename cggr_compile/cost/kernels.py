"""The kernels that a graph of ATen calls comes to, as a compiler fuses it: what each computes, reads and writes.

A product, an attention, a sort is a kernel of its own. What works on one element after the other, and sums over
features, is fused: with all that it is connected to, between two such kernels.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from cggr_compile import compat
from cggr_compile.cost.flops import flops
from cggr_compile.cost.propagate import ATTENTION, ATTENTION_BACKWARD, Sizes, sizes_of
from cggr_compile.cost.sizes import expression

aten, prims, cggr = torch.ops.aten, torch.ops.prims, torch.ops.cggr
_VIEWS = {
    *(aten.view, aten.reshape, aten._unsafe_view, aten.permute, aten.t, aten.transpose, aten.unsqueeze, aten.squeeze),
    *(aten.expand, aten.slice, aten.select, aten.alias, aten.detach, aten.split, aten.split_with_sizes, aten.unbind),
    *(aten.as_strided, aten.diagonal),
}
# made where they are read
_CONSTANTS = {aten.full, aten.scalar_tensor, aten.empty, aten.full_like, prims.iota, aten.empty_like, aten.new_zeros}
_REDUCTIONS = {
    aten.sum,
    aten.mean,
    aten.amax,
    aten.amin,
    aten.any,
    aten.argmax,
    aten._softmax,
    aten.prod,
    aten.var_mean,
}
_LOADS = {aten.index, aten._unsafe_index, aten.gather, aten.embedding, cggr.gather_rows}
_FUSED = {
    *(aten.clone, aten.cat, aten.constant_pad_nd, aten.slice_scatter, aten.select_scatter, aten.where),
    *(prims.convert_element_type, cggr.check_labels, cggr.concat_in_place, cggr.fusion_barrier, cggr.materialize),
}
_BARRIERS = {cggr.fusion_barrier, cggr.materialize}
_ATTENTION = {*ATTENTION, *ATTENTION_BACKWARD, cggr.attention_rows_backward}


_READS = 4  # of values that one computed again may read


@dataclass
class Kernel:
    """One launch.

    Attributes:
        kind: "product", "attention", or "other", which only moves data.
        block: the path of the block that it belongs to; "" where that is none, or not known.
        flops, bytes: at the sizes of the capture. flops_form, bytes_form: the same as expressions.
        causal: whether about half of what ``flops`` says is not computed.
    """

    kind: str
    block: str
    flops: int
    bytes: int
    flops_form: sympy.Expr
    bytes_form: sympy.Expr
    causal: bool = False


def kernels(graph: Graph, sizes: Sizes, blocks: Mapping[Node, str]) -> list[Kernel]:
    """What runs, in the order of the graph.

    Args:
        blocks: of the model, that each call belongs to.
    """
    return _Fusion(graph, sizes, blocks).kernels()


def storage(node: Node) -> Node:
    """The node whose memory a node's value lies in."""
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def bytes_of(node: Node, sizes: Sizes) -> tuple[int, sympy.Expr]:
    """Of a node's value, or of several together."""
    value: Any = node.meta.get("val")
    shapes = sizes.of(node)
    if shapes is None:
        return 0, sympy.Integer(0)
    if isinstance(value, Tensor):
        return _bytes(value, shapes)
    parts = [_bytes(one, shape) for one, shape in zip(value, shapes, strict=True)]
    return sum(count for count, _ in parts), sympy.Add(*(form for _, form in parts))


class _Fusion:
    """Groups of calls: each is named by its first one.

    What is computed element by element from a few values, and read by other fused calls only, is computed again where
    it is read. Of the others, those of one block belong together that read one another or the same value, and that wait
    for as many kernels.
    """

    def __init__(self, graph: Graph, sizes: Sizes, blocks: Mapping[Node, str]) -> None:
        self._sizes, self._blocks = sizes, blocks
        self._first: dict[Node, Node] = {}
        # by node: the values in memory that it reads, each with the value whose size says how much of it
        self._reads: dict[Node, dict[Node, Node]] = {}
        self._again: set[Node] = set()
        self._calls = [node for node in graph.nodes if _kind(node) in ("fused", "alone")]
        level: dict[Node, int] = {}
        readers: dict[Any, Node] = {}
        for node in graph.nodes:
            if node not in self._reads and _kind(node) in ("fused", "alone"):
                self._reads[node] = self._read_by(node)
                if _is_cheap(node) and len(self._reads[node]) <= _READS:
                    self._again.add(node)
            before = self._reads.get(node) or dict.fromkeys(storage(one) for one in node.all_input_nodes)
            level[node] = max((level[one] + (_kind(one) == "alone") for one in before), default=0)
            if _kind(node) != "fused" or node in self._again:
                continue
            self._first[node] = node
            if _sums_tokens(node):
                continue
            for one in before:
                if _kind(one) == "fused" and level[one] == level[node] and not _sums_tokens(one):
                    self._join(node, one)
                self._join(node, readers.setdefault((one, level[node], blocks.get(node), _count(node)), node))

    def kernels(self) -> list[Kernel]:
        groups: dict[Node, list[Node]] = defaultdict(list)
        for node in self._calls:
            if node not in self._again:
                groups[self._group(node)].append(node)
        return [kernel for nodes in groups.values() if (kernel := self._kernel(nodes)) is not None]

    def _read_by(self, node: Node) -> dict[Node, Node]:
        found: dict[Node, Node] = {}
        for one in node.all_input_nodes:
            base = storage(one)
            if base in self._again:
                _add(found, self._reads[base])
            elif _kind(base) != "constant":
                size = one if _count(one) < _count(base) else base
                loaded = _packet(node) in _LOADS and base is storage(node.all_input_nodes[0])
                _add(found, {base: node if loaded and _count(node) < _count(size) else size})
        return found

    def _join(self, node: Node, other: Node) -> None:
        if self._blocks.get(node) == self._blocks.get(other):
            self._first[self._group(node)] = self._group(other)

    def _group(self, node: Node) -> Node:
        while self._first.get(node, node) is not node:
            node = self._first[node]
        return node

    def _kernel(self, nodes: list[Node]) -> Kernel | None:
        inside, read = set(nodes), dict[Node, Node]()
        for node in nodes:
            _add(read, {base: size for base, size in self._reads[node].items() if base not in inside})
        written = [node for node in nodes if any(user not in inside for user in self._readers(node))]
        if not written:
            return None
        moved = [bytes_of(node, self._sizes) for node in (*read.values(), *written)]
        counts = [flops(node, self._sizes) for node in nodes]
        total = sum(count for count, _ in counts)
        head = next((node for node in nodes if _packet(node) in _ATTENTION), None)
        return Kernel(
            "other" if not total else "product" if head is None else "attention",
            next((block for node in nodes if (block := self._blocks.get(node, ""))), ""),
            total,
            sum(count for count, _ in moved),
            sympy.Add(*(form for _, form in counts)),
            sympy.Add(*(form for _, form in moved)),
            head is not None and _is_causal(head),
        )

    def _readers(self, node: Node) -> Iterable[Node]:
        """Who reads a node's value: through views, as one of several, and through what is computed again."""
        for user in _readers(node):
            if user in self._again:
                yield from self._readers(user)
            else:
                yield user


def _add(reads: dict[Node, Node], others: Mapping[Node, Node]) -> None:
    """Add what is read; of a value that is read in several ways all is."""
    for base, size in others.items():
        reads[base] = size if reads.get(base, size) is size else base


def _bytes(value: Tensor, shape: Any) -> tuple[int, sympy.Expr]:
    count = value.element_size()
    for size in sizes_of(value):
        count *= size
    return count, value.element_size() * sympy.Mul(*map(expression, shape))


def _packet(node: Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _is_view(node: Node) -> bool:
    if node.op != "call_function":
        return False
    return _packet(node) in _VIEWS or (node.target is operator.getitem and _kind(node.all_input_nodes[0]) == "view")


def _kind(node: Node) -> str:
    """ "input", "view", "constant", "item" of several results, "fused", or "alone": a kernel of its own."""
    if node.op != "call_function":
        return "input"
    packet = _packet(node)
    if packet in _VIEWS:
        return "view"
    if packet is operator.getitem:
        return "view" if _kind(node.all_input_nodes[0]) == "view" else "item"
    if packet in _CONSTANTS:
        return "constant"
    fused = packet in _REDUCTIONS or packet in _LOADS or packet in _FUSED
    # numbers that are put into a constant are found by comparing places
    fused = fused or (packet is aten.scatter and _packet(node.all_input_nodes[0]) in _CONSTANTS)
    elementwise = isinstance(node.target, compat.OpOverload) and torch.Tag.pointwise in node.target.tags
    return "fused" if fused or elementwise else "alone"


def _is_cheap(node: Node) -> bool:
    """Whether a call can be made again by everyone who reads it: element by element, and nobody needs it in memory."""
    if _kind(node) != "fused" or _packet(node) in _REDUCTIONS or _packet(node) in _BARRIERS:
        return False
    return all(_kind(user) == "fused" for user in _readers(node))


def _count(node: Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 1 << 62


def _sums_tokens(node: Node) -> bool:
    """Whether a reduction is over other dims than the last: another order of reading than what makes its operand."""
    if _packet(node) not in _REDUCTIONS or len(node.args) < 2:
        return False
    value, dims = node.all_input_nodes[0].meta.get("val"), node.args[1]
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    return isinstance(value, Tensor) and any(isinstance(d, int) and d % value.dim() < value.dim() - 1 for d in listed)


def _readers(node: Node) -> Iterable[Node]:
    """Who reads a node's value, through views and as one of several."""
    for user in node.users:
        if _is_view(user) or user.target is operator.getitem:
            yield from _readers(user)
        else:
            yield user


def _is_causal(node: Node) -> bool:
    arguments = compat.schema(node.target).arguments  # type: ignore[arg-type]
    places = {argument.name: place for place, argument in enumerate(arguments)}
    for name in ("is_causal", "causal"):
        if name in places:
            place = places[name]
            value = node.args[place] if place < len(node.args) else node.kwargs.get(name, False)
            return bool(value)
    return False
