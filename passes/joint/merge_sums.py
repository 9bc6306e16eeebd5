"""Computes small sums over rows of the backward pass together: the gradients of the weights of norms."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cggr_compile.passes.base import JointPass, PassResult
from cggr_compile.passes.fx import Emitter, backward_of, is_static
from cggr_compile.passes.nodes import fake_value, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.fx import Graph, Node

aten = torch.ops.aten
CAST = torch.ops.prims.convert_element_type.default
# Bytes of what is kept to be summed together. It would be summed at once otherwise, so the peak rises by as much.
MAX_BUFFERED_BYTES = 2**24
# At least this many must fit: with fewer, the launches saved do not count beside the time of sums that large.
MIN_GROUP = 4


@dataclass(frozen=True)
class RowSum:
    """``result = sum(terms)`` over all axes but the last, reshaped and cast at most; nothing but an output reads it."""

    terms: Node  # [..., N]
    result: Node  # N elements

    @property
    def kind(self) -> tuple[Any, ...]:
        """What sums have in common that are computed together."""
        terms = fake_value(self.terms)
        return tuple(terms.shape), terms.dtype, fake_value(self.result).dtype, terms.device


class MergeSums(JointPass):
    """Defers sums over rows until there are several of one shape, and computes these as one.

    Before::

        dw1 = sum(y1, rows); ...; dw2 = sum(y2, rows); ...; dw3 = sum(y3, rows)

    After::

        # each written by the kernel of the input gradient beside it
        y = cggr.concat_in_place([cggr.materialize(y1), ...], 0)
        dw1, dw2, dw3 = sum(y, rows)

    The sums are the same apart from the order of their additions. Few rows leave most of a device idle, and each sum is
    two launches: one for parts of the rows, one for the parts' sums.
    """

    name = "merge_sums"
    optional = True

    def __call__(self, graph: Graph) -> PassResult:
        groups = list(_groups(graph))
        for sums in groups:
            _merge(graph, sums)
        if not groups:
            return PassResult(False, "no small sums over rows")
        graph.eliminate_dead_code()
        return PassResult(True, f"{sum(map(len, groups))} sums over rows, as {len(groups)}")


def _groups(graph: Graph) -> Iterator[list[RowSum]]:
    kinds: dict[Any, list[RowSum]] = defaultdict(list)
    backward = backward_of(graph)
    for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        if node in backward and (found := _row_sum(node)) is not None:
            kinds[found.kind].append(found)
    for sums in kinds.values():
        terms = fake_value(sums[0].terms)
        fitting = MAX_BUFFERED_BYTES // max(1, terms.numel() * terms.element_size())
        if fitting >= MIN_GROUP:
            groups = (sums[begin : begin + fitting] for begin in range(0, len(sums), fitting))
            yield from (group for group in groups if len(group) > 1)


def _row_sum(node: Node) -> RowSum | None:
    terms: Any = node.args[0]
    axes: Any = node.args[1]
    shape = shape_of(terms)
    every_row = len(shape) > 1 and sorted(axis % len(shape) for axis in axes) == list(range(len(shape) - 1))
    if node.kwargs or not every_row or not is_static(terms) or not fake_value(terms).is_floating_point():
        return None
    if terms.op == "placeholder":
        return None  # in memory already, and no call may stand between the placeholders
    result, casts = node, 0
    while len(result.users) == 1 and (user := next(iter(result.users))).target in (aten.view.default, CAST):
        result = user
        casts += user.target is CAST
    if casts > 1 or [user.op for user in result.users] != ["output"]:
        return None
    return RowSum(terms, result)


def _merge(graph: Graph, sums: Sequence[RowSum]) -> None:
    emit = Emitter(graph, fake_value(sums[0].terms).fake_mode, key="val")
    shape, dtype, result_dtype, _ = sums[0].kind
    parts = []
    for each in sums:
        with emit.before(each.terms.next, MergeSums.name):
            parts.append(emit.call(torch.ops.cggr.materialize.default, each.terms))
    with emit.before(sums[-1].result, MergeSums.name):
        joined = emit.call(torch.ops.cggr.concat_in_place.default, parts, 0)
        rows = emit.call(aten.view.default, joined, [len(sums), math.prod(shape[:-1]), shape[-1]])
        summed = emit.call(aten.sum.dim_IntList, rows, [1])
        if result_dtype != dtype:
            summed = emit.call(CAST, summed, result_dtype)
        for index, each in enumerate(sums):
            result = emit.call(aten.select.int, summed, 0, index)
            each.result.replace_all_uses_with(emit.shaped(result, shape_of(each.result)))
