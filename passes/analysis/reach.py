"""Which positions of the sequence a trained input acts at: a walk from the losses back to the graph's inputs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from cggr_compile import compat
from cggr_compile.passes.analysis.positions import WHOLE, Holding, Region
from cggr_compile.passes.analysis.uses import RULES, WEIGHED, Lookup, Place, Use, choice, differentiable, pointwise
from cggr_compile.passes.base import GraphContext
from cggr_compile.passes.facts import LayerStack, LossSite
from cggr_compile.passes.fx import ancestors, descendants
from cggr_compile.passes.nodes import argument, fake_value, op_name, same_size, shape_of

if TYPE_CHECKING:
    from torch.fx import GraphModule


@dataclass(frozen=True)
class Part:
    """One way on which a trained input takes part.

    Attributes:
        region: the positions that it acts at, or more than these.
        narrower: whether it may act at a part of them only, of which nothing is known.
        individual: whether each position has entries of its own, as a soft prompt's, so that those of one position
            learn nothing at another.
        per_example: whether every sequence has entries of its own, as ``inputs_embeds``.
    """

    region: Region
    narrower: bool
    individual: bool
    per_example: bool


@dataclass
class Reach:
    """What the walk has found.

    Attributes:
        parts: of every input that requires grad, in the graph's order.
        tokens: where rows of a table stand that ids of each sequence name: the text.
    """

    parts: dict[Node, list[Part]] = field(default_factory=lambda: defaultdict(list))
    tokens: list[Region] = field(default_factory=list)


def reach(gm: GraphModule, ctx: GraphContext) -> Reach:
    """Walk from the losses to every input that requires grad.

    The rows of the residual stream are followed from block to block: whatever happens inside, a block's input has the
    positions of its output. From there on down, joining pieces (``cat``), replacing positions (``where``,
    ``masked_scatter``), blanking them (``x * mask``), slicing and padding say which positions an operand acts at.
    """
    return _Walk(gm, ctx).run()


class _Walk:
    def __init__(self, gm: GraphModule, ctx: GraphContext) -> None:
        stack = ctx[LayerStack]
        assert stack is not None and ctx[LossSite] is not None
        self.gm, self.loss = gm, ctx[LossSite].loss
        self.boundaries = {node for block in stack.blocks for node in (block.input, block.output)}
        entry = stack.blocks[0].input
        random = [node for node in gm.graph.nodes if op_name(node) in _RANDOM]
        self.place = Place(shape_of(entry)[0], ancestors([entry]), descendants([entry, *random]))
        texts = [n for n in self.place.before if self._reads_text(n)]
        self.text = descendants(texts) if texts else stack.stream

    def run(self) -> Reach:
        found = Reach()
        outputs = [n for n in self.gm.graph.output_node().all_input_nodes if not shape_of(n)]
        todo = [(node, Use("shared", WHOLE)) for node in (self.loss, *outputs)]
        seen: set[tuple[Node, Use]] = set()
        while todo:
            node, use = todo.pop()
            if node in self.boundaries:
                use = Use("rows", WHOLE, axis=1)
            if (node, use) in seen or not differentiable(node):
                continue
            seen.add((node, use))
            if node.op in ("placeholder", "get_attr"):
                found.parts[node].append(self._part(node, use))
                continue
            if self._is_text(node, use):
                found.tokens.append(use.region)
            todo += self._operands(node, use)
        return found

    def _part(self, leaf: Node, use: Use) -> Part:
        shape, lookup = shape_of(leaf), use.lookup
        if lookup is not None:
            region, rows = lookup.region, use.region
            if not rows.whole:
                region = region.where(Holding(lookup.index, lookup.axis, lookup.first, rows, lookup.size))
            added = rows.begin > 0 or bool(rows.conditions)  # to a table that is there
            return Part(region, use.narrower, individual=added or not lookup.per_sequence, per_example=False)
        individual = use.kind == "mixed" or (use.kind == "rows" and not same_size(shape[use.axis], 1))
        batched = len(shape) >= 3 and same_size(shape[0], self.place.batch) and (use.kind, use.axis) != ("rows", 0)
        placed = use.kind == "rows" or leaf in self.place.before
        parameter = isinstance(fake_value(leaf), torch.nn.Parameter)
        return Part(use.region, use.narrower, individual, individual and batched and placed and not parameter)

    def _reads_text(self, node: Node) -> bool:
        read = _table_of(node)
        return read is not None and node in self.place.before and _per_sequence(read[1], self.place.batch)

    def _is_text(self, node: Node, use: Use) -> bool:
        return use.lookup is None and use.kind != "shared" and not use.narrower and self._reads_text(node)

    def _operands(self, node: Node, use: Use) -> Iterator[tuple[Node, Use]]:
        read = _table_of(node)
        if read is not None and use.lookup is None and use.kind == "rows" and use.axis < len(shape_of(read[1])):
            table, index = read
            per_sequence = _per_sequence(index, self.place.batch)
            lookup = Lookup(index, use.axis, use.first, shape_of(table)[0], use.region, per_sequence)
            yield table, Use("rows", WHOLE, narrower=use.narrower, lookup=lookup)
            return
        rule = RULES.get(op_name(node))
        found = rule(self.place, node, use) if rule is not None and use.kind == "rows" else None
        if found is None:
            yield from self._unknown(node, use)
        else:
            yield from found

    def _unknown(self, node: Node, use: Use) -> Iterator[tuple[Node, Use]]:
        """Operands of a call without a rule: they act where the call does, or at some of these positions."""
        operands = [n for n in node.all_input_nodes if differentiable(n)]
        if use.kind == "shared":
            yield from ((n, use) for n in operands)
            return
        base = self._base(node, use) if self._may_place(node) else operands
        for operand in operands:
            if op_name(node) in WEIGHED and operand is not node.all_input_nodes[0]:
                chosen = node in self.place.before and choice(node.all_input_nodes[0]) is not None
                yield operand, use.mixed(narrower=True) if chosen else use.shared()
            elif _foreign(node) and len(shape_of(operand)) < 2:
                yield operand, use.shared()  # the scale of somebody's own norm
            else:
                yield operand, use.mixed(narrower=operand not in base)

    def _may_place(self, node: Node) -> bool:
        """Whether an operand may end up at a part of the positions."""
        name = op_name(node)
        if node not in self.place.before or RULES.get(name) is pointwise:
            return False
        return name == "pad" or len([n for n in node.all_input_nodes if _is_floating(n)]) > 1

    def _base(self, node: Node, use: Use) -> list[Node]:
        """What the other operands may be put into: the text, or the most of it; of a table, what has as many rows."""
        operands = node.all_input_nodes
        if use.lookup is not None:
            return [n for n in operands if shape_of(n)[:1] == shape_of(node)[:1]]
        texts = [n for n in operands if n in self.text and _is_floating(n)]
        sizes = {n: math.prod(size if isinstance(size, int) else 1 for size in shape_of(n)) for n in texts}
        return [n for n in texts if sizes[n] == max(sizes.values())]


_RANDOM = ("rand", "rand_like", "randn", "randn_like", "bernoulli", "uniform", "normal", "dropout", "multinomial")


def _is_floating(node: Node) -> bool:
    value = fake_value(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _foreign(node: Node) -> bool:
    """Whether a call is of somebody's own operator or autograd function."""
    target = node.target
    return isinstance(target, compat.HigherOrderOperator) or (
        isinstance(target, compat.OpOverload) and target.namespace != "aten"
    )


def _table_of(node: Node) -> tuple[Node, Node] | None:
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


def _per_sequence(index: Node, batch: Any) -> bool:
    """Whether every sequence brings indices of its own."""
    inputs = [n for n in ancestors([index]) if n.op in ("placeholder", "get_attr")]
    return any(len(shape_of(n)) >= 2 and same_size(shape_of(n)[0], batch) for n in inputs if not differentiable(n))
