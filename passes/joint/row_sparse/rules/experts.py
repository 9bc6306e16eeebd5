"""The backward of Mixture-of-Experts layers from the selected tokens' (token, expert) pairs only."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.joint.row_sparse.layout import Layout
from cggr_compile.passes.joint.row_sparse.rule import Rule, rule
from cggr_compile.passes.nodes import shape_of

if TYPE_CHECKING:
    from cggr_compile.passes.joint.row_sparse.annotations import Annotations
    from cggr_compile.passes.joint.row_sparse.values import RowValues

ops = torch.ops.cggr

LAYOUT: Layout = ("BS", None)


@dataclass(frozen=True)
class ExpertsBackward:
    """The arguments of a ``moe_mlp_backward`` or ``moe_clamped_mlp_backward``, and what they are computed from."""

    grad: Node
    hidden: Node
    matrices: tuple[Node, ...]
    weights: Node
    inner: Node
    position: Node
    chosen: Node
    num_experts: int
    numbers: tuple[Any, ...]

    def results(self, node: Node) -> Mapping[Node, Layout]:
        return {getter: LAYOUT for getter in node.users if getter.args[1] in (0, 1 + len(self.matrices))}

    def apply(self, rv: RowValues, node: Node) -> None:
        """The selected tokens are sorted by expert anew; what gate and up gave is gathered for their pairs."""
        top_k = shape_of(self.weights)[1]
        target: Any = node.target

        def on_rows(
            chosen: Tensor,
            rows: Tensor,
            grad: Tensor,
            hidden: Tensor,
            weights: Tensor,
            inner: Tensor,
            position: Tensor,
            *matrices: Tensor,
        ) -> Any:
            order, *rest = ops.moe_permute(chosen, self.num_experts)
            token = order.div(top_k, rounding_mode="floor")
            pair = rows[token] * top_k + order.remainder(top_k)
            return target(grad, hidden, *matrices, weights, inner[position[pair]], order, *rest, *self.numbers)

        made = rv.emit.trace(
            on_rows,
            rv.rows_of(self.chosen, LAYOUT),
            rv.flat_rows(self.inner),
            rv.sparse[self.grad].values,
            rv.rows_of(self.hidden, LAYOUT),
            rv.rows_of(self.weights, LAYOUT),
            *(self.inner, self.position, *self.matrices),
        )
        results = self.results(node)
        for getter in node.users:
            value = made[int(getter.args[1])]  # type: ignore[arg-type]
            if getter in results:  # of the tokens, of their routing weights
                rv.put(getter, value, LAYOUT)
            else:
                rv.stand_for(getter, value)


class Experts(Rule):
    """A backward whose output gradient is sparse::

        dx, dW1, dW2, dw = moe_mlp_backward(scatter(g), x, W1, W2, w, inner, *moe_permute(chosen, E))

    becomes::

        permuted = moe_permute(chosen[rows], E)
        dx_rows, dW1, dW2, dw_rows = moe_mlp_backward(g, x[rows], W1, W2, w[rows], inner[pairs], *permuted)
    """

    numbers = 0  # how many come after the tensors

    def carry(self, at: Annotations, node: Node) -> ExpertsBackward | None:
        arguments: Any = node.args
        tensors = arguments[: len(arguments) - self.numbers]
        grad, hidden, *matrices, weights, inner, order, position, _ = tensors
        permute = order.args[0] if order.target is operator.getitem else order
        if at.layout_of(grad) != LAYOUT or permute.target is not ops.moe_permute.default:
            return None
        chosen, num_experts = permute.args
        return ExpertsBackward(
            *(grad, hidden, tuple(matrices), weights, inner, position, chosen, num_experts),
            numbers=arguments[len(tensors) :],
        )


@rule(ops.moe_mlp_backward.default)
class GatedExperts(Experts):
    pass


@rule(ops.moe_clamped_mlp_backward.default)
class ClampedExperts(Experts):
    numbers = 2
