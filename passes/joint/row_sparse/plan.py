"""What becomes of a call, said before anything is changed: which operands are wanted on which rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch.fx import Node
from torch.fx.node import map_aggregate

if TYPE_CHECKING:
    from cggr_compile.passes.joint.row_sparse.division import Division
    from cggr_compile.passes.joint.row_sparse.layout import Layout
    from cggr_compile.passes.joint.row_sparse.values import RowValues


@dataclass(frozen=True)
class At:
    """An operand: the rows of ``node``, laid out as ``layout``; seen with ``rank`` axes where it has fewer."""

    node: Node
    layout: Layout
    rank: int = 0

    def made(self, rv: RowValues) -> Node:
        return rv.rows_of(rv.with_rank(rv.current(self.node), self.rank), self.layout)


@dataclass(frozen=True)
class ZerosAt:
    """An operand: zeros in the place of the rows of ``node``."""

    node: Node
    layout: Layout

    def made(self, rv: RowValues) -> Node:
        return rv.zeros(self.node, self.layout)


class Plan(Protocol):
    """What becomes of one call of the backward pass."""

    def results(self, node: Node) -> Mapping[Node, Layout | Division]:
        """The values that are on rows then, and how these are laid out; which of their columns, if not all."""

    def apply(self, rv: RowValues, node: Node) -> None:
        """Insert what the plan says, in front of ``node``."""


@dataclass(frozen=True)
class Call:
    """The same operator with operands on rows, :class:`At` and :class:`ZerosAt` among its arguments.

    Attributes:
        layout: of the result's rows; None where the result is an ordinary tensor, a sum over all positions.
        make: what inserts the call instead, from the operands.
    """

    args: tuple[Any, ...]
    layout: Layout | None
    make: Callable[..., Node] | None = None

    def results(self, node: Node) -> Mapping[Node, Layout]:
        return {} if self.layout is None else {node: self.layout}

    def apply(self, rv: RowValues, node: Node) -> None:
        made = self.made(rv, node)
        if self.layout is not None:
            rv.put(node, made, self.layout)
        else:
            rv.replace(node, made)

    def made(self, rv: RowValues, node: Node) -> Node:
        def operand(arg: Any) -> Any:
            if isinstance(arg, (At, ZerosAt)):
                return arg.made(rv)
            return rv.current(arg) if isinstance(arg, Node) else arg

        args: Any = map_aggregate(self.args, operand)
        if self.make is not None:
            return self.make(rv, *args)
        return rv.emit.call(node.target, *args, **node.kwargs)


@dataclass(frozen=True)
class Densify:
    """The operator as it is, with the full tensors of ``operands``."""

    operands: tuple[Node, ...]

    def results(self, node: Node) -> Mapping[Node, Layout]:
        return {}

    def apply(self, rv: RowValues, node: Node) -> None:
        for operand in self.operands:
            node.replace_input_with(operand, rv.dense(operand))
