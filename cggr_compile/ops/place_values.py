"""``cggr::place_values``: per-token values that are exact everywhere, and differentiated at some rows only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cggr_compile.ops.library import define_composite, define_opaque


def place_values_reference(exact: Tensor, values: Tensor, index: Tensor, factors: Tensor) -> Tensor:
    """``exact``, with the gradient of some of its rows.

    The gradient of ``values`` is, for each slot, that of its row times its factor; that of ``exact`` is zero.

    Args:
        exact: [N, ...], the values of all positions.
        values: [B, K, ...], the same values of some positions, computed of these; only their gradient matters.
        index: int64 [B, K], which row of ``exact`` each is.
        factors: float32 [B, K]; 0 for a slot that is not used, whatever its values.
    """
    return exact.clone()


def place_values_backward_reference(grad: Tensor, index: Tensor, factors: Tensor) -> Tensor:
    """The gradient of ``values`` from that of all positions."""
    taken = grad[index]
    factors = factors.reshape(*factors.shape, *[1] * (taken.dim() - 2))
    return torch.where(factors != 0, taken * factors.to(taken.dtype), 0.0)


place_values = define_opaque(
    "place_values(Tensor exact, Tensor values, Tensor index, Tensor factors) -> Tensor",
    place_values_reference,
    lambda exact, values, index, factors: torch.empty_like(exact),
)
place_values_backward = define_composite(
    "place_values_backward(Tensor grad, Tensor index, Tensor factors) -> Tensor", place_values_backward_reference
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
    return None, place_values_backward(grad, *ctx.saved_tensors), None, None


torch.library.register_autograd("cggr::place_values", _backward, setup_context=_setup)
