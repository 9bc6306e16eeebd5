"""Follows named sizes through a graph of ATen calls: what every call's result has of its operands' sizes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from cggr_compile import compat
from cggr_compile.cost.sizes import Atom, Shape, Size, cut, number, resolve, shifted, split, total, unify, value_of

aten = torch.ops.aten
ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
)
ATTENTION_BACKWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward,
)
LENGTH = "S"
SHIFT = 2  # positions: of labels behind their tokens, of a first token that is left out
Shapes = Shape | tuple[Shape, ...]


class Sizes:
    """The sizes of a graph's values.

    Args:
        inputs: what is known of placeholders, by their names.
        rows: how many rows of a sequence are taken, by name: what has such a size and comes from nowhere else is one.
    """

    def __init__(self, graph: Graph, inputs: Mapping[str, Shape], rows: Mapping[str, int]) -> None:
        self._known: dict[Node, Shapes] = {}
        self._rows = {value: (Atom(value, {f"{name}*S"}),) for name, value in reversed([*rows.items()])}
        for node in graph.nodes:
            value = node.meta.get("val")
            if node.op == "placeholder" and node.name in inputs:
                self._known[node] = inputs[node.name]
            elif isinstance(value, Tensor):
                self._known[node] = self._of_tensor(node, sizes_of(value), 0)
            elif isinstance(value, (tuple, list)) and all(isinstance(each, Tensor) for each in value):
                self._known[node] = tuple(self._of_tensor(node, sizes_of(each), i) for i, each in enumerate(value))

    def of(self, node: Node) -> Shapes | None:
        """Of a tensor, or of each in a tuple of them; None for what is neither."""
        return self._known.get(node)

    def shape(self, value: Any) -> Shape | None:
        """Of an operand, if it is a tensor."""
        found = self._known.get(value) if isinstance(value, Node) else None
        return None if found is None or not isinstance(value.meta.get("val"), Tensor) else found  # type: ignore[return-value]

    def rows(self, value: int) -> Size:
        """So many of a sequence's positions."""
        return self._rows.get(value) or number(value)

    def _of_tensor(self, node: Node, values: Sequence[int], result: int) -> Shape:
        call = Call(node, result, tuple(values), self)
        rule = next((rule for applies, rule in _RULES if applies(node)), matched)
        found = rule(call) if node.op == "call_function" else None
        if found is None or tuple(map(value_of, found)) != call.values:
            found = matched(call)
        return found


class Call(NamedTuple):
    """A call, and one of its results: the values of its sizes."""

    node: Node
    result: int
    values: tuple[int, ...]
    sizes: Sizes

    @property
    def shapes(self) -> list[Shape]:
        """Of its tensors, those in lists included."""
        return [shape for node in self.node.all_input_nodes if (shape := self.sizes.shape(node)) is not None]

    def argument(self, place: int, otherwise: Any = None) -> Any:
        return self.node.args[place] if place < len(self.node.args) else otherwise

    def shape(self, place: int) -> Shape:
        found = self.sizes.shape(self.argument(place))
        return () if found is None else found


def sizes_of(value: Tensor) -> tuple[int, ...]:
    return tuple(int(size) for size in value.shape)


def matched(call: Call) -> Shape:
    """Of an operator that is not known: each size is that of the operand which has it in the same place, or else, where
    only one size is equal, that."""
    found = []
    for place, value in enumerate(call.values):
        same = [shape[place] for shape in call.shapes if place < len(shape) and value_of(shape[place]) == value]
        other = {resolve(size) for shape in call.shapes for size in shape if value_of(size) == value > 1}
        if same:
            found.append(same[0])
        elif len(other) == 1:
            found.append(other.pop())
        else:
            found.append(call.sizes.rows(value) if _is_ours(call.node) and not other else number(value))
    return tuple(found)


def _elementwise(call: Call) -> Shape:
    found: list[Size | None] = [None] * len(call.values)
    for shape in call.shapes:
        for place, size in enumerate(reversed(shape), 1):
            if place > len(found) or value_of(size) != call.values[-place] or not size:
                continue
            if (before := found[-place]) is None:
                found[-place] = size
            else:
                unify(before, size)
    return tuple(number(v) if s is None else s for s, v in zip(found, call.values, strict=True))


def _view(call: Call) -> Shape | None:
    """Sizes that are joined, and sizes that are divided: groups of equal product."""
    before, after, found = list(call.shape(0)), list(call.values), list[Size]()
    while after:
        values = [after.pop(0)]
        joined: Size = before.pop(0) if before else ()
        while value_of(joined) != math.prod(values):
            if value_of(joined) < math.prod(values) and before:
                joined = (*joined, *before.pop(0))
            elif value_of(joined) > math.prod(values) and after:
                values.append(after.pop(0))
            else:
                return None
        parts = split(joined, values)
        if parts is None:
            return None
        found += parts
    return tuple(found)


def _permute(call: Call) -> Shape:
    before = call.shape(0)
    order = call.argument(1) if call.node.target is aten.permute.default else reversed(range(len(before)))
    return tuple(before[place] for place in order)


def _unsqueeze(call: Call) -> Shape:
    place = call.argument(1) % len(call.values)
    before = call.shape(0)
    return (*before[:place], (), *before[place:])


def _squeeze(call: Call) -> Shape:
    dims = call.argument(1)
    before = call.shape(0)
    gone = {dim % len(before) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    return tuple(size for place, size in enumerate(before) if place not in gone or value_of(size) > 1)


def _expand(call: Call) -> Shape:
    before = call.shape(0)
    old: tuple[Size | None, ...] = (None,) * (len(call.values) - len(before)) + before
    return tuple(
        size if size is not None and value_of(size) == value else number(value)
        for size, value in zip(old, call.values, strict=True)
    )


def _select(call: Call) -> Shape:
    before, dim = call.shape(0), call.argument(1, 0)
    return tuple(size for place, size in enumerate(before) if place != dim % len(before))


def _slice(call: Call) -> Shape:
    """What was put there, a few positions more or less of a sequence, a number of rows; of anything else a number."""
    dim, start = call.argument(1, 0), call.argument(2, 0)
    found = []
    for place, (old, new) in enumerate(zip(call.shape(0), call.values, strict=True)):
        part = cut(resolve(old), start, new) if place == dim % len(call.values) and isinstance(start, int) else None
        found.append(_shortened(call, old, new) if part is None else part)
    return tuple(found)


def _padded(call: Call) -> Shape:
    return tuple(_shortened(call, old, new) for old, new in zip(call.shape(0), call.values, strict=True))


def _shortened(call: Call, old: Size, new: int) -> Size:
    value = value_of(old)
    if value == new:
        return old
    if any(LENGTH in atom.names for atom in resolve(old)):
        return shifted(old, new) if abs(value - new) <= SHIFT else call.sizes.rows(new)
    return number(new)


def _concatenation(call: Call) -> Shape:
    parts = [shape for node in call.argument(0) if (shape := call.sizes.shape(node)) is not None]
    dim = call.argument(1, 0) % len(call.values)
    parts = [part for part in parts if len(part) == len(call.values)]
    found = []
    for place in range(len(call.values)):
        column = [part[place] for part in parts]
        if place != dim:
            for size in column[1:]:
                unify(column[0], size)
        found.append(column[0] if place != dim or len(column) == 1 else total(column))
    return tuple(found)


def _reduction(call: Call) -> Shape | None:
    dims, keep, before = call.argument(1), call.argument(2, False), call.shape(0)
    if dims is None or dims == []:
        dims = range(len(before))
    gone = {dim % len(before) for dim in (dims if not isinstance(dims, int) else [dims])} if before else set[int]()
    sizes = [None if place in gone else size for place, size in enumerate(before)]
    return tuple(() if size is None else size for size in sizes if keep or size is not None)


def _like_first(call: Call) -> Shape | None:
    return call.shape(0)


def _index(call: Call) -> Shape | None:
    before, indices = call.shape(0), call.argument(1)
    taken = [(place, shape) for place, i in enumerate(indices) if (shape := call.sizes.shape(i)) is not None]
    places = [place for place, _ in taken]
    if not taken or places != list(range(places[0], places[0] + len(places))):
        return None
    longest = max((shape for _, shape in taken), key=len)
    for _, shape in taken:
        for one, other in zip(reversed(longest), reversed(shape), strict=False):
            if one and other:
                unify(one, other)
    return (*before[: places[0]], *longest, *before[places[-1] + 1 :])


def _product(call: Call) -> Shape:
    *_, left, right = [shape for shape in call.shapes if len(shape) > 1][-2:]
    if len(call.shapes) > 1 and call.node.target in (aten.mm.default, aten.bmm.default):
        left, right = call.shape(0), call.shape(1)
    unify(left[-1], right[-2])
    if len(left) == 3:
        unify(left[0], right[0])
    return (*left[:-1], right[-1])


def _attention(call: Call) -> Shape | None:
    """Query, key and value have one head size (where they are equal), key and value one length."""
    query, key, value = call.shape(0), call.shape(1), call.shape(2)
    if min(len(query), len(key), len(value)) < 4:
        return None
    _unify_attention(query, key, value)
    if call.result == 0:
        return (*query[:3], value[3])
    return query[:3] if call.values == tuple(map(value_of, query[:3])) else None


def _attention_backward(call: Call) -> Shape | None:
    query, key, value = call.shape(1), call.shape(2), call.shape(3)
    _unify_attention(query, key, value)
    return (query, key, value)[call.result] if call.result < 3 else None


def _attention_rows_backward(call: Call) -> Shape | None:
    """Keys and values: of all positions, or of the rows."""
    found, rows = _attention_backward(call), call.shape(1)[2]
    if found is None or call.result == 0 or call.argument(10):
        return found
    return (*found[:2], rows, found[3])


def _unify_attention(query: Shape, key: Shape, value: Shape) -> None:
    for one, other in (
        (query[3], key[3]),
        (query[3], value[3]),
        (query[0], key[0]),
        (key[2], value[2]),
        (key[1], value[1]),
    ):
        unify(one, other)


def _item(call: Call) -> Shape | None:
    found = call.sizes.of(call.argument(0))
    value = call.argument(0).meta.get("val")
    if isinstance(value, (tuple, list)) and found is not None:
        return found[call.argument(1)]
    return None


def _is_ours(node: Node) -> bool:
    return isinstance(node.target, compat.OpOverload) and node.target.namespace == "cggr"


def _is(*packets: Any) -> Callable[[Node], bool]:
    return lambda node: getattr(node.target, "overloadpacket", node.target) in packets


def _is_elementwise(node: Node) -> bool:
    target = node.target
    return isinstance(target, compat.OpOverload) and torch.Tag.pointwise in target.tags


_RULES: list[tuple[Callable[[Node], bool], Callable[[Call], Shape | None]]] = [
    (lambda node: node.target is operator.getitem, _item),
    (_is(aten.view, aten.reshape, aten._unsafe_view), _view),
    (_is(aten.permute, aten.t), _permute),
    (_is(aten.unsqueeze), _unsqueeze),
    (_is(aten.squeeze), _squeeze),
    (_is(aten.expand), _expand),
    (_is(aten.select), _select),
    (_is(aten.slice), _slice),
    (_is(aten.constant_pad_nd), _padded),
    (_is(aten.cat, torch.ops.cggr.concat_in_place), _concatenation),
    (_is(aten.sum, aten.mean, aten.amax, aten.amin, aten.any, aten.prod, aten.argmax), _reduction),
    (_is(aten.slice_scatter, aten.scatter, aten.index_put, aten.cumsum, aten.select_scatter), _like_first),
    (_is(aten._unsafe_masked_index_put_accumulate, aten._softmax, aten.scatter_add), _like_first),
    (_is(aten.index, aten._unsafe_index), _index),
    (_is(aten.mm, aten.addmm, aten.bmm, aten.baddbmm), _product),
    (_is(*ATTENTION), _attention),
    (_is(*ATTENTION_BACKWARD), _attention_backward),
    (_is(torch.ops.cggr.attention_rows_backward), _attention_rows_backward),
    (_is_elementwise, _elementwise),
    (_is(aten.clone, aten.alias, aten.detach, torch.ops.prims.convert_element_type), _like_first),
]
