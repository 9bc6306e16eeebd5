"""Reduces the gradient of a sharded parameter once where it is read in several places, as tied embeddings are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cggr_compile import compat
from cggr_compile.passes.base import JointPass, PassResult
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value, shape_of

if TYPE_CHECKING:
    from torch.fx import Graph, Node

    from cggr_compile.options import Options

aten = torch.ops.aten
REDUCTIONS = frozenset({compat.REDUCE_SCATTER, compat.ALL_REDUCE} - {None})
# a sum of these is one of the sum, apart from rounding
LINEAR = REDUCTIONS | {
    aten._to_copy.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.view.default,
    compat.WAIT,
    torch.ops.prims.convert_element_type.default,
}


class SumBeforeReducing(JointPass):
    """Adds what every use gives before the collective, not behind it.

    Before::

        grad = wait(reduce_scatter(a)) + wait(reduce_scatter(b))

    After, as autograd adds them where the parameter is not sharded::

        grad = wait(reduce_scatter(a + b))
    """

    name = "sum_before_reducing"
    optional = True
    dense = True

    def enabled(self, options: Options) -> bool:
        return True

    def __call__(self, graph: Graph) -> PassResult:
        count = 0
        for total in list(graph.nodes):
            if total.target is not aten.add.Tensor or total.kwargs:
                continue
            shared = _shared(total)
            if not any(one.target in REDUCTIONS for one, _ in shared):
                continue
            emit = Emitter(graph, fake_value(total).fake_mode, key="val")
            with emit.before(total, self.name):
                one, other = shared[-1]
                value = emit.call(aten.add.Tensor, one.args[0], other.args[0])
                for one, _ in reversed(shared):
                    value = emit.call(one.target, value, *one.args[1:], **one.kwargs)
            total.replace_all_uses_with(value)
            for node in (total, *(node for pair in shared for node in pair)):
                graph.erase_node(node)
            count += 1
        if not count:
            return PassResult(False, "no sum of reduced gradients")
        return PassResult(True, f"{count} reductions less", {"fewer": count})


def _shared(total: Node) -> list[tuple[Node, Node]]:
    """What is done to both terms alike, the last first."""
    found: list[tuple[Node, Node]] = []
    one, other = total.args[:2]
    while isinstance(one, torch.fx.Node) and isinstance(other, torch.fx.Node) and _alike(one, other):
        found.append((one, other))
        one, other = one.args[0], other.args[0]
    return found


def _alike(one: Node, other: Node) -> bool:
    if one is other or one.target is not other.target or one.target not in LINEAR:
        return False
    if len(one.users) != 1 or len(other.users) != 1 or (one.args[1:], one.kwargs) != (other.args[1:], other.kwargs):
        return False
    pairs = [(one, other), (one.args[0], other.args[0])]
    return all(shape_of(a) == shape_of(b) and fake_value(a).dtype == fake_value(b).dtype for a, b in pairs)
