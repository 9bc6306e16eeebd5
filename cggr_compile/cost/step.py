"""The cost of a training step, dense and selective, as expressions in its sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.nn import Module

from cggr_compile.cost.blocks import blocks_of, listed
from cggr_compile.cost.graphs import Captured, Halves, capture
from cggr_compile.cost.kernels import Kernel, bytes_of, kernels, storage
from cggr_compile.cost.propagate import Sizes, sizes_of
from cggr_compile.cost.roles import Role, axes, name_roles, short_names
from cggr_compile.cost.sizes import Atom, Shape, number, symbol, value_of
from cggr_compile.cost.text import text
from cggr_compile.cost.work import Work, per_layer, work_of
from cggr_compile.options import Options

aten = torch.ops.aten
BATCH, LENGTH = symbol("B"), symbol("S")


@dataclass(frozen=True)
class Step:
    """One training step: its two halves, and the bytes that the forward keeps for the backward, without parameters
    and inputs."""

    forward: Work
    backward: Work
    memory: sympy.Expr

    def renamed(self, names: Mapping[sympy.Symbol, sympy.Symbol]) -> Step:
        """The same in other symbols."""
        return Step(self.forward.renamed(names), self.backward.renamed(names), self.memory.xreplace(names))

    @property
    def symbols(self) -> set[sympy.Symbol]:
        return {*self.forward.symbols, *self.backward.symbols, *self.memory.free_symbols}

    @property
    def flops(self) -> sympy.Expr:
        return self.forward.flops + self.backward.flops

    @property
    def bytes(self) -> sympy.Expr:
        return self.forward.bytes + self.backward.bytes


@dataclass(frozen=True)
class Cost:
    """What a training step costs.

    Attributes:
        values: of the symbols in the capture: B sequences (no symbol of a single one) of S positions, L layers;
            ``rho`` and ``r``, the shares of the rows that carry loss and gradient (where they are the same, only
            ``rho``); and sizes of the model.
        roles: which size of the model a symbol stands for.
        dense: the graph as it was captured, differentiated from the loss alone.
        selective: as it was rewritten; None where it stays dense.
        device: that the model is on.
    """

    values: Mapping[str, sympy.Rational]
    roles: Mapping[str, Role]
    dense: Step
    selective: Step | None
    device: str = "cpu"

    def __str__(self) -> str:
        return text(self)

    def at(self, expression: sympy.Expr, **sizes: float) -> float:
        """The number that an expression comes to, at the sizes of the capture but for those given by name.

        Raises:
            ValueError: a name that is no symbol of this model.
        """
        return float(expression.xreplace(self.substitution(**sizes)))

    def substitution(self, **sizes: float) -> dict[sympy.Symbol, sympy.Expr]:
        """Values by symbols: those of the capture but for those given by name.

        Raises:
            ValueError: a name that is no symbol of this model.
        """
        for name in sizes:
            if name not in self.values:
                raise ValueError(f"{name} must be one of {', '.join(self.values)}")
        return {symbol(name): sympy.nsimplify(value) for name, value in {**self.values, **sizes}.items()}


def cost(model: Module, args: Sequence[Any], kwargs: Mapping[str, Any], options: Options) -> Cost | None:
    """Count the training graph of ``model(*args, **kwargs)``, of several the one with most parameters; None: none."""
    graphs = capture(model, args, kwargs, options)
    if not graphs:
        return None
    device = next((str(p.device) for p in model.parameters()), "cpu")
    return count(max(graphs, key=lambda graph: sum(graph.dense.trained)), device)


def count(captured: Captured, device: str = "cpu") -> Cost:
    """Put what the graphs do into expressions."""
    tokens = {} if captured.tokens is None else {"B": captured.tokens[0], "S": captured.tokens[1]}
    # a batch of one comes and goes as an axis, so that nothing tells where it is a factor
    atoms = {name: (Atom(value, {name}),) if value > 1 else () for name, value in tokens.items()}
    parameters: dict[str, Shape] = {}
    halves = [half for half in (captured.dense, captured.selective) if half is not None]
    counted = [
        _Counted(half, atoms, captured.rows if half is captured.selective else {}, parameters) for half in halves
    ]
    roles = name_roles(parameters, counted[0].table)
    layers = listed(counted[0].blocks[0].values())
    values = {name: sympy.Integer(value) for name, value in tokens.items()}
    length = values.get("S", sympy.Integer(1))
    values |= {name: rows / length for name, rows in captured.rows.items()}
    values |= {"L": sympy.Integer(len(layers))} if layers else {}
    values |= {name: sympy.Integer(role.value) for name, role in roles.items()}
    by_symbol = {symbol(name): value for name, value in values.items()}
    steps = [each.step(layers, by_symbol, list(captured.rows)) for each in counted]
    used = {one.name for step in steps for one in step.symbols}
    short = short_names({name: role for name, role in roles.items() if name in used})
    names = {symbol(long): symbol(name) for long, name in short.items()}
    steps = [step.renamed(names) for step in steps]
    always = {"L", *(name for name, size in atoms.items() if size)}
    values = {short.get(name, name): value for name, value in values.items() if name in used or name in always}
    told = {short[long]: role for long, role in roles.items() if long in used}
    return Cost(values, told, steps[0], steps[1] if len(steps) > 1 else None, device)


class _Counted:
    """The two halves of a step, and what is known of their sizes."""

    def __init__(
        self, halves: Halves, tokens: Mapping[str, Any], rows: Mapping[str, int], parameters: dict[str, Shape]
    ) -> None:
        self._halves = halves
        self.graphs = [halves.forward.graph, halves.backward.graph]
        placeholders = list(self.graphs[0].find_nodes(op="placeholder"))
        inputs = {}
        for place, node in enumerate(placeholders):
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                continue
            inputs[node.name] = self._input(place, sizes_of(value), tokens, parameters)
        self.table = self._table(placeholders)
        forward = Sizes(self.graphs[0], inputs, rows)
        known = {node.name: shape for node in self.graphs[0].nodes if (shape := forward.shape(node)) is not None}
        self.sizes = [forward, Sizes(self.graphs[1], known, rows)]
        self.blocks = [blocks_of(graph) for graph in self.graphs]

    def step(self, layers: list[str], values: Mapping[sympy.Symbol, Any], rows: Sequence[str]) -> Step:
        """To be called when the symbols have their names."""
        works = []
        for graph, sizes, blocks in zip(self.graphs, self.sizes, self.blocks, strict=True):
            found = [_with_shares(kernel, rows) for kernel in kernels(graph, sizes, blocks)]
            works.append(work_of(found, layers, values))
        return Step(works[0], works[1], _with_share(self._memory(layers), rows))

    def _memory(self, layers: list[str]) -> sympy.Expr:
        """What the forward returns behind its results, each memory once."""
        results: Any = self.graphs[0].output_node().args[0]
        kept = results[self._halves.results :]
        nodes = dict.fromkeys(storage(node) for node in kept if isinstance(node, Node))
        counts: dict[sympy.Expr, Counter[str]] = {}
        for node in nodes:
            if node.op != "placeholder":
                counts.setdefault(bytes_of(node, self.sizes[0])[1], Counter())[self.blocks[0][node]] += 1
        return sympy.Add(*(form * per_layer(each, layers) for form, each in counts.items()))

    def _input(
        self, place: int, values: tuple[int, ...], tokens: Mapping[str, Any], parameters: dict[str, Shape]
    ) -> Shape:
        names, trained = self._halves.names, self._halves.trained
        if place < len(names) and (trained[place] or names[place] in parameters):
            return parameters.setdefault(names[place], axes(names[place], values))
        if tokens and values[:2] == tuple(map(value_of, tokens.values())):
            return (*tokens.values(), *map(number, values[2:]))
        return tuple(map(number, values))

    def _table(self, placeholders: list[Node]) -> str | None:
        for node in self.graphs[0].nodes:
            if node.target is aten.embedding.default and storage(node.args[0]) in placeholders:
                return self._halves.names[placeholders.index(storage(node.args[0]))]
        return None


def _with_shares(kernel: Kernel, rows: Sequence[str]) -> Kernel:
    kernel.flops_form, kernel.bytes_form = _with_share(kernel.flops_form, rows), _with_share(kernel.bytes_form, rows)
    return kernel


def _with_share(form: sympy.Expr, rows: Sequence[str]) -> sympy.Expr:
    """Numbers of rows as shares of the length."""
    return form.xreplace({symbol(f"{name}*S"): symbol(name) * LENGTH for name in rows})
