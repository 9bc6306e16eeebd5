"""``cggr::gather_rows`` and its backward ``cggr::scatter_rows``: the selected rows of a hidden state.

They stay operators of their own down to the joint graph, where they tell the optimising passes which rows
carry gradient; there they are replaced by ATen. ``cggr::fusion_barrier`` stays to the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cggr_compile.ops.library import define_opaque


def gather_rows_reference(hidden: Tensor, rows: Tensor, keep: Tensor) -> Tensor:
    """``hidden`` [B, S, H] at ``rows`` (int64 [B, K], distinct per sequence) -> [B, K, H].

    ``keep`` bool [B, K] is False for unused slots: their row is read, but passes no gradient on.
    """
    return hidden.gather(1, rows[:, :, None].expand(-1, -1, hidden.shape[2]))


def scatter_rows_reference(values: Tensor, rows: Tensor, keep: Tensor, length: int) -> Tensor:
    """``values`` [B, K, H] at the kept ``rows`` of a zero tensor [B, length, H]: the adjoint of gather_rows."""
    values = values.masked_fill(~keep[:, :, None], 0.0)
    zeros = values.new_zeros(values.shape[0], length, values.shape[2])
    return zeros.scatter(1, rows[:, :, None].expand(-1, -1, values.shape[2]), values)


def _fake_gather(hidden: Tensor, rows: Tensor, keep: Tensor) -> Tensor:
    return hidden.new_empty(rows.shape[0], rows.shape[1], hidden.shape[2])


def _fake_scatter(values: Tensor, rows: Tensor, keep: Tensor, length: int) -> Tensor:
    return values.new_empty(values.shape[0], length, values.shape[2])


gather_rows = define_opaque(
    "gather_rows(Tensor hidden, Tensor rows, Tensor keep) -> Tensor", gather_rows_reference, _fake_gather
)
scatter_rows = define_opaque(
    "scatter_rows(Tensor values, Tensor rows, Tensor keep, SymInt length) -> Tensor",
    scatter_rows_reference,
    _fake_scatter,
)


def _fake_barrier(rows: Tensor, number: int = 0) -> Tensor:
    return torch.empty_like(rows)


def fusion_barrier_reference(rows: Tensor, number: int = 0) -> Tensor:
    """A copy of ``rows`` that no kernel is fused with; two of different ``number`` are not merged.

    A compiler that fuses the selection with gathers at those rows, of activations of *all* layers, cannot run it
    before the last layer; every gather then waits for it, and every layer's dense activations stay alive until then.
    """
    return rows.clone()


fusion_barrier = define_opaque(
    "fusion_barrier(Tensor rows, int number=0) -> Tensor", fusion_barrier_reference, _fake_barrier
)


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, rows, keep = inputs
    ctx.save_for_backward(rows, keep)
    ctx.length = hidden.shape[1]


def _backward_gather(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return scatter_rows(grad, *ctx.saved_tensors, ctx.length), None, None


torch.library.register_autograd("cggr::gather_rows", _backward_gather, setup_context=_setup_gather)
