"""Which positions of the sequence a trained input acts at: a walk from the loss back to the graph's inputs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from cggr_compile import compat
from cggr_compile.passes.analysis.effects import memory, mutated_operands
from cggr_compile.passes.analysis.nonzero import multiplied, whole
from cggr_compile.passes.analysis.positions import WHOLE, Holding, Region
from cggr_compile.passes.analysis.products import PRODUCTS, WEIGHED
from cggr_compile.passes.analysis.uses import RULES, Lookup, Place, Use, pointwise, table_of
from cggr_compile.passes.base import GraphContext
from cggr_compile.passes.facts import FinalStates, LayerStack, LossSite
from cggr_compile.passes.fx import ancestors, descendants
from cggr_compile.passes.nodes import differentiable, fake_value, op_name, same_size, shape_of

if TYPE_CHECKING:
    from torch.fx import GraphModule


@dataclass(frozen=True)
class Part:
    """One way in which a trained input takes part.

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
        tokens: where rows of a table stand that the ids of each sequence choose: the text.
    """

    parts: dict[Node, list[Part]] = field(default_factory=lambda: defaultdict(list))
    tokens: list[Region] = field(default_factory=list)


def reach(gm: GraphModule, ctx: GraphContext) -> Reach:
    """Walk from the loss to every input that requires grad.

    The rows of the residual stream are followed from block to block: whatever happens inside, a block's input has the
    positions of its output. From there on down, joining pieces (``cat``), replacing positions (``where``,
    ``masked_scatter``), slicing and padding say which positions an operand acts at; and so does a product, one of whose
    factors is data or blanked (``select @ prompt``, ``linear(x * mask, weight)``).
    """
    return _Walk(gm, ctx).run()


class _Walk:
    def __init__(self, gm: GraphModule, ctx: GraphContext) -> None:
        stack = ctx[LayerStack]
        self.gm, self.ends = gm, ctx[LossSite].ends
        self.boundaries = {node for block in stack.blocks for node in (block.input, block.output)}
        entry = stack.blocks[0].input
        leaves = [n for n in gm.graph.nodes if n.op in ("placeholder", "get_attr") and shape_of(n)]
        learned = {n for n in leaves if isinstance(fake_value(n), torch.nn.Parameter) or differentiable(n)}
        random = descendants(n for n in gm.graph.nodes if op_name(n) in _RANDOM)
        random -= descendants(set(leaves) - learned)
        batch, length = shape_of(entry)[:2]
        aside = descendants([entry]) | random
        self.place = Place(batch, length, ancestors([entry]), aside, descendants(learned), self.boundaries)
        self.writes = list(_writes(gm))
        self.written = descendants(n for where, _, _ in self.writes for n in gm.graph.nodes if _in(n, where))
        texts = [n for n in self.place.before if self._reads_text(n)]
        self.text = descendants(texts) if texts else ctx[FinalStates].stream

    def run(self) -> Reach:
        found = Reach()
        todo = [(end, Use("shared", WHOLE)) for end in self.ends]
        seen: set[tuple[Node, Use]] = set()
        while todo:
            node, use = todo.pop()
            if node in self.boundaries:
                use = Use("rows", WHOLE, axis=1)
            if (node, use) in seen or not self._carries(node):
                continue
            seen.add((node, use))
            todo += self._put_into(node, use)
            if node.op in ("placeholder", "get_attr"):
                if differentiable(node):
                    found.parts[node].append(self._part(node, use))
                continue
            if self._is_text(node, use):
                found.tokens.append(use.region)
            todo += self._operands(node, use)
        return found

    def _carries(self, node: Node) -> bool:
        return differentiable(node) or node in self.written

    def _put_into(self, node: Node, use: Use) -> Iterator[tuple[Node, Use]]:
        """What is put into a part of a value in place: ``x[:, :4] = prompt``."""
        for where, write, values in self.writes:
            if _in(node, where) and write is not node and use.kind != "shared":
                yield from ((n, use.mixed(narrower=n not in self.place.aside)) for n in values)

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
        read = table_of(node)
        return read is not None and node in self.place.before and _per_sequence(read[1], self.place.batch)

    def _is_text(self, node: Node, use: Use) -> bool:
        return use.lookup is None and use.kind != "shared" and not use.narrower and self._reads_text(node)

    def _operands(self, node: Node, use: Use) -> Iterator[tuple[Node, Use]]:
        read = table_of(node)
        if read is not None and use.lookup is None and use.kind == "rows" and use.axis < len(shape_of(read[1])):
            table, index = read
            per_sequence = _per_sequence(index, self.place.batch)
            lookup = Lookup(index, use.axis, use.first, shape_of(table)[0], use.region, per_sequence)
            yield table, Use("rows", WHOLE, narrower=use.narrower, lookup=lookup)
            return
        if use == Use("mixed", WHOLE) and self.place.own_rows(node):
            use = Use("rows", WHOLE, axis=1)  # a block's own rows
        rule = _RULES.get(op_name(node))
        found = rule(self.place, node, use) if rule is not None and use.kind == "rows" else None
        if found is None:
            yield from self._unknown(node, use)
        else:
            yield from found

    def _unknown(self, node: Node, use: Use) -> Iterator[tuple[Node, Use]]:
        """Operands of a call without a rule: they act where the call does, or at some of these positions."""
        operands = [n for n in node.all_input_nodes if self._carries(n)]
        if use.kind == "shared":
            yield from ((n, use) for n in operands)
            return
        base = self._base(node, use) if self._may_place(node) else operands
        for operand in operands:
            if op_name(node) in WEIGHED and operand is not node.all_input_nodes[0]:
                others = [n for n in node.all_input_nodes if n is not operand]
                chosen = self._positions(node) and not all(whole(self.place, n, use.mixed(), True) for n in others)
                yield operand, use.mixed(narrower=True) if chosen else use.shared()
            elif _foreign(node) and len(shape_of(operand)) < 2 and not self._data(node):
                yield operand, use.shared()  # the scale of somebody's own norm
            else:
                yield operand, use.mixed(narrower=operand not in base)

    def _may_place(self, node: Node) -> bool:
        """Whether an operand may end up at a part of the positions."""
        name = op_name(node)
        if RULES.get(name) is pointwise or table_of(node) is not None:
            return False
        several = name == "pad" or len([n for n in node.all_input_nodes if _is_floating(n)]) > 1
        return (several and node in self.place.before) or self._data(node)

    def _positions(self, node: Node) -> bool:
        """Whether a mixed value still tells positions apart, as far as is known."""
        return node in self.place.before or self.place.flat(node)

    def _data(self, node: Node) -> bool:
        """Whether a call takes data that may say which positions."""
        data = [n for n in node.all_input_nodes if shape_of(n) and self.place.is_data(n)]
        return self._positions(node) and bool(data)

    def _base(self, node: Node, use: Use) -> list[Node]:
        """What the other operands may be put into: the text, or the most of it; of a table, what has as many rows."""
        operands = node.all_input_nodes
        if use.lookup is not None:
            return [n for n in operands if shape_of(n)[:1] == shape_of(node)[:1]]
        texts = [n for n in operands if n in self.text and _is_floating(n)]
        sizes = {n: math.prod(size if isinstance(size, int) else 1 for size in shape_of(n)) for n in texts}
        return [n for n in texts if sizes[n] == max(sizes.values())]


_RULES = {**RULES, **dict.fromkeys(PRODUCTS, multiplied)}
_RANDOM = ("rand", "rand_like", "randn", "randn_like", "bernoulli", "uniform", "normal", "dropout", "multinomial")


def _writes(gm: GraphModule) -> Iterator[tuple[frozenset[int], Node, list[Node]]]:
    """Calls that write something trained: the memory, the call, what it writes."""
    for node in gm.graph.nodes:
        targets = mutated_operands(node)
        values = [n for n in node.all_input_nodes if n not in targets and differentiable(n)]
        for target in targets if values else ():
            where = memory(target)
            if where:
                yield where, node, values


def _in(node: Node, where: frozenset[int]) -> bool:
    return not where.isdisjoint(memory(node) or ())


def _is_floating(node: Node) -> bool:
    value = fake_value(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _foreign(node: Node) -> bool:
    """Whether a call is of somebody's own operator or autograd function."""
    target = node.target
    return isinstance(target, compat.HigherOrderOperator) or (
        isinstance(target, compat.OpOverload) and target.namespace != "aten"
    )


def _per_sequence(index: Node, batch: Any) -> bool:
    """Whether every sequence brings indices of its own."""
    inputs = [n for n in ancestors([index]) if n.op in ("placeholder", "get_attr")]
    return any(len(shape_of(n)) >= 2 and same_size(shape_of(n)[0], batch) for n in inputs if not differentiable(n))
