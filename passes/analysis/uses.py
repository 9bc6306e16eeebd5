"""How the operands of one call act at the positions that its result acts at: a rule for each operator.

Operators that multiply are in :mod:`products`: a factor acts only where the others are not zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.fx import Node

from cggr_compile.passes.analysis.positions import Flags, Listed, Region
from cggr_compile.passes.nodes import argument, fake_value, op_name, same_size, shape_of


@dataclass(frozen=True)
class Lookup:
    """What reads a table of ``size`` rows: ``index`` (integers, the tokens on ``axis``), entry i at ``first + i``.

    ``region``: the positions. ``per_sequence``: whether every sequence brings indices of its own.
    """

    index: Node
    axis: int
    first: int
    size: Any
    region: Region
    per_sequence: bool


@dataclass(frozen=True)
class Use:
    """How a value takes part.

    Attributes:
        kind: ``rows``: along ``axis`` it has an entry for each position (in a table: for each of its rows), entry i
            for position ``first + i``; ``mixed``: it has, but where is not known; ``shared``: every position uses all
            of it.
        region: the positions (in a table: its rows) that it acts at, or more than these.
        narrower: whether it may act at a part of them only, of which nothing is known.
        lookup: what reads it, if it is part of a table.
    """

    kind: Literal["rows", "mixed", "shared"]
    region: Region
    axis: int = 0
    first: int = 0
    narrower: bool = False
    lookup: Lookup | None = None

    def shared(self) -> Use:
        return replace(self, kind="shared", axis=0, first=0)

    def mixed(self, narrower: bool = False) -> Use:
        return replace(self, kind="mixed", axis=0, first=0, narrower=self.narrower or narrower)


@dataclass(frozen=True)
class Place:
    """What rules need to know of the graph.

    Attributes:
        batch, length: sequences in a batch, and their positions.
        before: what the first block's input is computed from.
        aside: masks that tell no positions: computed from the first block's input, so a block's own affair, or at
            random, so with labels as often as elsewhere.
        filled: what is computed from parameters, or from inputs that require grad; the rest is data, and may be zero.
        stream: the inputs and outputs of blocks.
        found: of values, where they are not zero; see ``nonzero.whole``.
    """

    batch: Any
    length: Any
    before: set[Node]
    aside: set[Node]
    filled: set[Node]
    stream: set[Node]
    found: dict[tuple[Node, Use, bool], list[Use]] = field(default_factory=dict)

    def is_data(self, node: Node) -> bool:
        """Whether a value may be zero: given, or decided before the first block."""
        value = fake_value(node)
        decided = node in self.before and isinstance(value, torch.Tensor) and not value.is_floating_point()
        return node not in self.aside and (node not in self.filled or decided)

    def broadcast(self, node: Node, operand: Node, use: Use) -> Use:
        """``use`` of an elementwise call, for an operand."""
        axis = use.axis - (len(shape_of(node)) - len(shape_of(operand)))
        if axis < 0 or not same_size(shape_of(operand)[axis], shape_of(node)[use.axis]):
            return use.shared()
        return replace(use, axis=axis)

    def masked(self, node: Node, use: Use, mask: Any, holds: bool = True) -> Use:
        """``use`` of a call, where ``mask`` (an operand of it) holds."""
        return self.flagged(node, use, mask, node in self.before, holds)

    def flagged(self, node: Node, use: Use, mask: Any, strict: bool, holds: bool = True) -> Use:
        """``use`` of ``node``, where ``mask`` holds; ``strict``: whatever the mask looks like."""
        if not isinstance(mask, Node):
            return use
        size, mask = shape_of(node)[use.axis], _unexpanded(mask)
        axis = use.axis - (len(shape_of(node)) - len(shape_of(mask)))
        if axis < 0 or not same_size(shape_of(mask)[axis], size):
            return use
        if mask in self.aside:
            return self._given(use, mask, axis, strict) if holds else use
        if not strict and any(not same_size(n, 1) for n in shape_of(mask)[axis + 1 :]):
            return use  # in a block: angles of rotary embeddings, or who attends to whom
        batched = axis == 1 and any(same_size(shape_of(mask)[0], n) for n in (1, self.batch))
        if not (axis == 0 or batched) or not isinstance(size, int):
            return replace(use, narrower=use.narrower or strict)
        return replace(use, region=use.region.where(Flags(mask, axis, use.first), holds))

    def _given(self, use: Use, mask: Node, axis: int, strict: bool) -> Use:
        """``use``, where the data holds that a block's own mask is made of too."""
        name, own = op_name(mask), replace(use, axis=axis)
        if name in _BOTH:
            for n in mask.all_input_nodes:
                own = self.flagged(mask, own, n, strict)
        elif name in _VIEWS:
            for n, part in _VIEWS[name](self, mask, own) or []:
                own = self.flagged(n, part, n, strict)
        return replace(use, region=own.region, narrower=own.narrower)

    def own_rows(self, node: Node) -> bool:
        """Whether a value is in a block, and its second axis has the positions."""
        size = shape_of(node)[:2]
        return node not in self.before and len(size) == 2 and all(map(same_size, size, (self.batch, self.length)))

    def flat(self, node: Node) -> bool:
        """Whether a value is in a block, and its first axis has the positions of all sequences."""
        both = isinstance(self.batch, int) and isinstance(self.length, int)
        return both and node not in self.before and shape_of(node)[:1] == (self.batch * self.length,)


Operands = list[tuple[Node, Use]]
Rule = Callable[[Place, Node, Use], Operands | None]


def pointwise(place: Place, node: Node, use: Use) -> Operands:
    return [(n, place.broadcast(node, n, use)) for n in node.all_input_nodes]


def _where(place: Place, node: Node, use: Use) -> Operands | None:
    if node.op == "call_method":  # x.where(mask, y)
        yes, mask, no = node.args[0], argument(node, 1, "condition"), argument(node, 2, "other")
    else:
        mask, yes, no = (argument(node, i, name) for i, name in enumerate(("condition", "input", "other")))
    return _either(place, node, use, mask, yes, no)


def _masked_fill(place: Place, node: Node, use: Use) -> Operands | None:
    x, mask, value = (argument(node, i, name) for i, name in enumerate(("input", "mask", "value")))
    return _either(place, node, use, mask, value, x)


def _either(place: Place, node: Node, use: Use, mask: Any, yes: Any, no: Any) -> Operands:
    pairs = [
        (n, place.masked(node, use, mask, holds)) for n, holds in ((yes, True), (no, False)) if isinstance(n, Node)
    ]
    return [(n, place.broadcast(node, n, part)) for n, part in pairs]


def _masked_scatter(place: Place, node: Node, use: Use) -> Operands | None:
    """``x`` with its entries where ``mask`` holds taken from ``source``, one after the other."""
    x, mask, source = (argument(node, i, name) for i, name in enumerate(("input", "mask", "source")))
    return [(x, place.masked(node, use, mask, False)), (source, place.masked(node, use, mask).mixed())]


def _index_copy(place: Place, node: Node, use: Use) -> Operands | None:
    """``x`` with the rows at ``index`` taken from ``source``, or with ``source`` added there."""
    x, dim, index, source = (argument(node, i, name) for i, name in enumerate(("input", "dim", "index", "source")))
    if not isinstance(dim, int) or dim % len(shape_of(node)) != use.axis:
        return None
    listed = use.region.where(Listed(index, use.first))
    return [(x, use), (source, replace(use, region=listed).mixed())]


def _index_put(place: Place, node: Node, use: Use) -> Operands | None:
    """``x`` with what ``indices`` name (a mask of the tokens, mostly) replaced by ``values``, or with these added."""
    x, indices, values = (argument(node, i, name) for i, name in enumerate(("input", "indices", "values")))
    if len(indices) == 1 and fake_value(indices[0]).dtype == torch.bool and use.axis < len(shape_of(indices[0])):
        spread = len(shape_of(node)) - len(shape_of(indices[0]))
        where = place.flagged(indices[0], use, indices[0], spread >= 0)
        return [(x, use), (values, where.mixed() if len(shape_of(values)) > spread else where.shared())]
    return [(x, use), *_put(place, use, values, *indices)]


def _scattered(place: Place, node: Node, use: Use) -> Operands:
    x, index, source = (argument(node, i, name) for i, name in ((0, "input"), (2, "index"), (3, "src")))
    return [(x, use), *_put(place, use, source, index)]


def _put(place: Place, use: Use, source: Any, *index: Any) -> Operands:
    """``source``, put where an index says that is not looked into."""
    own = all(not isinstance(n, Node) or n in place.aside for n in index)
    return [(source, use.mixed(narrower=not own))] if isinstance(source, Node) else []


def _slice_scatter(place: Place, node: Node, use: Use) -> Operands | None:
    x, source, dim, start, _, step = (
        argument(node, i, name, default)
        for i, (name, default) in enumerate(
            (("input", None), ("src", None), ("dim", 0), ("start", None), ("end", None), ("step", 1))
        )
    )
    start, size = start or 0, shape_of(source)[use.axis]
    if dim % len(shape_of(node)) != use.axis or step != 1 or not isinstance(size, int) or not _natural(start):
        return None
    return [(x, use), (source, _piece(use, use.first + start, size))]


def _piece(use: Use, begin: int, size: int) -> Use:
    """``use`` of an operand whose ``size`` entries belong to the positions from ``begin`` on."""
    return replace(use, first=begin, region=use.region.within(max(begin, 0), max(begin + size, 0)))


def _cat(place: Place, node: Node, use: Use) -> Operands | None:
    pieces: Any = argument(node, 0, "tensors")
    rank = len(shape_of(node))
    dim = min(rank - 1, 1) if op_name(node) == "hstack" else argument(node, 1, "dim", 0)
    if "axis" in node.kwargs:
        dim = node.kwargs["axis"]
    if not isinstance(dim, int) or not isinstance(pieces, (list, tuple)):
        return None
    if dim % rank != use.axis:
        return [(piece, use) for piece in pieces]
    found: Operands = []
    begin: int | None = use.first
    for piece in pieces:
        size = shape_of(piece)[use.axis]
        if begin is None:
            found.append((piece, use.mixed(narrower=True)))
        elif isinstance(size, int):
            found.append((piece, _piece(use, begin, size)))
            begin += size
        else:
            found.append((piece, replace(use, first=begin, region=use.region.within(max(begin, 0), None))))
            begin = None
    return found


def _stack(place: Place, node: Node, use: Use) -> Operands | None:
    pieces: Any = argument(node, 0, "tensors")
    dim = argument(node, 1, "dim", 0) % len(shape_of(node))
    if dim == use.axis:
        return None
    return [(piece, replace(use, axis=use.axis - (dim < use.axis))) for piece in pieces]


def _pad(place: Place, node: Node, use: Use) -> Operands | None:
    x, sizes, mode = argument(node, 0, "input"), argument(node, 1, "pad"), argument(node, 2, "mode", "constant")
    entry = 2 * (len(shape_of(node)) - 1 - use.axis)
    before = sizes[entry] if entry < len(sizes) else 0
    size = shape_of(x)[use.axis]
    if mode != "constant" or not isinstance(before, int) or not isinstance(size, int):
        return None
    return [(x, _piece(use, use.first + before, size))]


def _getitem(place: Place, node: Node, use: Use) -> Operands | None:
    source, index = node.args
    if isinstance(source, Node) and op_name(source) in ("chunk", "split", "tensor_split"):
        return _split(source, index, use)
    if not isinstance(source, Node) or not isinstance(fake_value(source), torch.Tensor):
        return None
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not (item is None or item is Ellipsis or type(item) is int or isinstance(item, slice)) for item in items):
        return None
    taken = len([item for item in items if item is not None and item is not Ellipsis])
    spread = [slice(None)] * (len(shape_of(source)) - taken)
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    old = new = 0
    for item in (*items[:at], *spread, *items[at + 1 :]):
        if isinstance(item, slice) and new == use.axis:
            start = item.start or 0
            if item.step not in (None, 1) or not isinstance(start, int):
                return None
            if start < 0:
                start += shape_of(source)[old]
            return [(source, replace(use, axis=old, first=use.first - start))] if _natural(start) else None
        old += item is not None
        new += type(item) is not int
    return None


def _split(node: Node, index: Any, use: Use) -> Operands | None:
    """One of the pieces of ``chunk`` or ``split``."""
    x, dim = argument(node, 0, "input"), argument(node, 2, "dim", 0)
    sizes = [piece.shape[use.axis] for piece in fake_value(node)][:index]
    if dim % len(shape_of(x)) != use.axis:
        return [(x, use)]
    return [(x, replace(use, first=use.first - sum(sizes)))] if _integers(tuple(sizes)) else None


def _narrow(place: Place, node: Node, use: Use) -> Operands | None:
    x, dim, start = (argument(node, i, name) for i, name in enumerate(("input", "dim", "start")))
    if dim % len(shape_of(node)) != use.axis:
        return [(x, use)]
    return [(x, replace(use, first=use.first - start))] if _natural(start) else None


def _natural(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _permuted(place: Place, node: Node, use: Use) -> Operands | None:
    source: Node = node.all_input_nodes[0]
    rank = len(shape_of(source))
    name = op_name(node)
    given: Any = node.args[1:]
    if name == "permute":
        order: Any = given[0] if len(given) == 1 else given
        if not isinstance(order, (list, tuple)) or not all(isinstance(axis, int) for axis in order):
            return None
        return [(source, replace(use, axis=order[use.axis] % rank))]
    pair = (-2, -1) if name in ("mT", "t") else given
    if len(pair) != 2 or not all(isinstance(axis, int) for axis in pair):
        return None
    one, other = (axis % rank for axis in pair)
    return [(source, replace(use, axis={one: other, other: one}.get(use.axis, use.axis)))]


def _reshaped(place: Place, node: Node, use: Use) -> Operands | None:
    """Views that leave the axis of the positions as it is, and merge or split others."""
    source: Node = node.all_input_nodes[0]
    old, new = shape_of(source), shape_of(node)
    before = torch.Size(new[: use.axis]).numel() if _integers(new) else None
    for axis, size in enumerate(old):
        in_front = torch.Size(old[:axis]).numel() if _integers(old) else None
        same = in_front == before if before is not None else axis == use.axis and old[:axis] == new[:axis]
        if same and same_size(size, new[use.axis]):
            return [(source, replace(use, axis=axis))]
    return None


def _integers(shape: tuple[Any, ...]) -> bool:
    return all(isinstance(size, int) for size in shape)


def _expanded(place: Place, node: Node, use: Use) -> Operands:
    source: Node = node.all_input_nodes[0]
    return [(source, place.broadcast(node, source, use))]


def _reduced(place: Place, node: Node, use: Use) -> Operands | None:
    """A sum or mean over other axes, which stay with size 1 or go."""
    source = node.all_input_nodes[0]
    old, new = shape_of(source), shape_of(node)
    dims: Any = argument(node, 1, "dim")
    if len(old) == len(new):
        return [(source, use)] if same_size(old[use.axis], new[use.axis]) else None
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, (list, tuple)):
        return None
    kept = [axis for axis in range(len(old)) if axis not in {dim % len(old) for dim in dims}]
    return [(source, replace(use, axis=kept[use.axis]))]


def table_of(node: Node) -> tuple[Node, Node] | None:
    """Table [V, H] and index of a lookup."""
    name = op_name(node)
    if name == "embedding":
        index, table = argument(node, 0, "input"), argument(node, 1, "weight")
    elif name == "getitem" or (name == "index_select" and argument(node, 1, "dim") == 0):
        table, index = node.args[0], node.args[-1]
        if isinstance(index, tuple) and len(index) == 1:
            index = index[0]
    else:
        return None
    if not isinstance(table, Node) or not isinstance(index, Node) or len(shape_of(table)) != 2:
        return None
    value = fake_value(index)
    whole = isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.bool
    return (table, index) if whole else None


def _unexpanded(mask: Node) -> Node:
    """The mask before it was spread over features, cast, and thinned out."""
    while op_name(mask) in _SPREAD and mask.all_input_nodes:
        mask = mask.all_input_nodes[0]
    return mask


_CASTS = ("float", "to", "type", "half", "bfloat16", "double", "type_as")
_VIEWS: dict[str, Rule] = {
    "getitem": _getitem,
    **dict.fromkeys(("permute", "transpose", "swapaxes", "swapdims", "t", "mT"), _permuted),
    **dict.fromkeys(("reshape", "view", "unsqueeze", "squeeze", "view_as", "reshape_as"), _reshaped),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expanded),
}
_BOTH = ("and", "bitwise_and", "logical_and", "mul")
_SPREAD = ("dropout", "expand", "expand_as", "broadcast_to", "contiguous", "clone", "bool", *_CASTS)
RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            *("add", "sub", "rsub", "neg", "pow", "square", "sqrt", "rsqrt", "reciprocal", "exp", "log", "abs"),
            *(
                "tanh",
                "sigmoid",
                "relu",
                "gelu",
                "silu",
                "clamp",
                "dropout",
                "softplus",
                "contiguous",
                "clone",
                "alias",
            ),
            *("identity", "requires_grad", *_CASTS),
        ),
        pointwise,
    ),
    "where": _where,
    "masked_fill": _masked_fill,
    "masked_scatter": _masked_scatter,
    **dict.fromkeys(("index_copy", "index_add"), _index_copy),
    "index_put": _index_put,
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), _scattered),
    "slice_scatter": _slice_scatter,
    **dict.fromkeys(("cat", "concatenate", "hstack"), _cat),
    "stack": _stack,
    "pad": _pad,
    **_VIEWS,
    "narrow": _narrow,
    **dict.fromkeys(("mean", "sum", "var", "norm", "amax"), _reduced),
}
