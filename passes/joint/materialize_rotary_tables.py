"""Computes the cosines and sines of rotary embeddings once, not again in every layer's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cggr_compile.passes.base import JointPass, PassResult
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch.fx import Graph, Node

aten = torch.ops.aten
VIEWS = {
    *(aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default),
    *(aten.permute.default, aten.slice.Tensor, aten.alias.default),
}
# So many kernels would each compute an angle again before it is worth a buffer of its own. No more than two: Inductor
# of torch 2.11 generates C++ that does not compile where angles are looked up inside a rotation.
MIN_READERS = 2


class MaterializeRotaryTables(JointPass):
    """Puts a fusion barrier behind cosines and sines of positions that many nodes read.

    Before::

        c = cos(positions * frequencies); q1 * c; k1 * c; q2 * c; ...      # fused into each: cos is elementwise

    After::

        c = cggr.fusion_barrier(cos(positions * frequencies)); q1 * c; k1 * c; q2 * c; ...

    A code generator that inlines elementwise work recomputes them for every element of every query and key; read from
    memory they cost next to nothing. The numbers are the same. Rotary embeddings: arXiv 2104.09864.
    """

    name = "materialize_rotary_tables"
    optional = True

    def __call__(self, graph: Graph) -> PassResult:
        angles = _angles(graph)
        passed_on = VIEWS | {torch.ops.cggr.fusion_barrier.default}
        read_often = [n for n in angles if n.target not in passed_on and len(_readers(n, angles)) >= MIN_READERS]
        for node in read_often:
            users = list(node.users)
            with Emitter(graph, fake_value(node).fake_mode, key="val").before(node.next, self.name) as emit:
                once = emit.call(torch.ops.cggr.fusion_barrier.default, node)
            for user in users:
                user.replace_input_with(node, once)
        if not read_often:
            return PassResult(False, "no angles that many layers read")
        return PassResult(True, f"{len(read_often)} tensors of cosines or sines in buffers of their own")


def _angles(graph: Graph) -> dict[Node, None]:
    """In order, what is computed from cosines and sines of positions, and from nothing else."""
    positional: set[Node] = set()
    found: dict[Node, None] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        if not value.is_floating_point():  # positions, those of the selected rows too
            known = True
        elif node.op == "placeholder":  # frequencies
            known = value.dim() <= 1
        else:
            known = node.op == "call_function" and positional.issuperset(node.all_input_nodes) and not _random(node)
        if known:
            positional.add(node)
            if node.target in (aten.cos.default, aten.sin.default) or any(n in found for n in node.all_input_nodes):
                found[node] = None
    return found


def _random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _readers(node: Node, angles: Collection[Node]) -> set[Node]:
    """The nodes that read ``node``, through views, to compute something that is not an angle."""
    readers: set[Node] = set()
    todo = [node]
    while todo:
        for user in todo.pop().users:
            if user.target in VIEWS:
                todo.append(user)
            elif user not in angles:
                readers.add(user)
    return readers
