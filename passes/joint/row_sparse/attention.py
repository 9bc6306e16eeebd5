"""The backward of attention, by whatever operator, from the selected queries only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.joint.row_sparse.checkpoints import ends_at_markers
from cggr_compile.passes.patterns.attention.base import BY_HEADS, KEY, QUERY, VALUE, Backward

if TYPE_CHECKING:
    from torch.fx import Node

    from cggr_compile.passes.joint.row_sparse.annotations import Annotations
    from cggr_compile.passes.joint.row_sparse.layout import Layout
    from cggr_compile.passes.joint.row_sparse.plan import Plan
    from cggr_compile.passes.joint.row_sparse.values import RowValues

aten = torch.ops.aten

CASTS = (torch.ops.prims.convert_element_type.default, aten._to_copy.default, aten.alias.default)


def attention(at: Annotations, call: Backward) -> Plan | None:
    """What becomes of an attention backward; None where its output gradient is dense, or a result unknown.

    Where its operator has an obstacle the backward stays dense, under a name in the report; the gradient of the queries
    is on rows all the same: without an output gradient a query has none.
    """
    found, layout = at.layout_of(call.grad), at.layout(*call.axes)
    if found is None or not call.getters().keys() <= call.gradients.keys():
        return None
    known = found == layout
    why = call.obstacle(at.batch) if known else f"an output gradient laid out as {found}"
    if why is not None:
        at.dense_attention[why] += 1
        return DenseAttention(call, layout, known)
    only_rows = all(ends_at_markers(getter, CASTS.__contains__) for getter in call.uses_of(KEY, VALUE))
    return AttentionOnRows(call, layout, at.layout(*BY_HEADS), only_rows)


@dataclass(frozen=True)
class DenseAttention:
    """The call as it is; ``known``: its queries' gradient is on rows."""

    call: Backward
    layout: Layout
    known: bool

    def results(self, node: Node) -> Mapping[Node, Layout]:
        return dict.fromkeys(self.call.uses_of(QUERY), self.layout) if self.known else {}

    def apply(self, rv: RowValues, node: Node) -> None:
        # there may be two sparse ones: FlexAttention's log-sum-exp has a gradient as well
        dense = rv.graph.node_copy(node, lambda n: rv.dense(n) if n in rv.sparse else n)
        results = self.results(node)
        for index, getters in self.call.getters().items():
            value = rv.emit.item(dense, index)
            for getter in getters:
                if getter in results:
                    rv.put(getter, rv.rows_of(value, self.layout), self.layout)
                else:
                    rv.stand_for(getter, value)


@dataclass(frozen=True)
class AttentionOnRows:
    """The backward from the selected queries; ``only_rows``: of the keys at the selected positions, too."""

    call: Backward
    layout: Layout
    heads: Layout
    only_rows: bool

    def results(self, node: Node) -> Mapping[Node, Layout]:
        which = (QUERY, KEY, VALUE) if self.only_rows else (QUERY,)
        return dict.fromkeys(self.call.uses_of(*which), self.layout)

    def apply(self, rv: RowValues, node: Node) -> None:
        results, values = self.results(node), rv.sparse[self.call.grad].values
        made = self._made(rv, values)
        for index, getters in self.call.getters().items():
            which = self.call.gradients[index]
            rows = rv.emit.item(made, which)
            if which != QUERY and self.only_rows:  # unused slots take no part
                rows = rv.zero_unused_slots(rows, self.heads)
            rows = self.call.from_heads(rv, rows)
            for getter in getters:
                if getter in results:
                    rv.put(getter, rows, self.layout)
                else:
                    rv.replace(getter, rows)

    def _made(self, rv: RowValues, grad: Node) -> Node:
        given = self.call.arguments(rv, self.heads)
        return rv.emit.call(
            torch.ops.cggr.attention_rows_backward.default,
            self.call.to_heads(rv, grad),
            rv.rows_of(given.query, self.heads),
            given.key,
            given.value,
            rv.rows_of(given.out, self.heads),
            given.logsumexp,
            rv.rows,
            given.mask,
            given.scale,
            given.causal,
            not self.only_rows,
            given.softcap,
        )
