"""``cggr::detach_unselected``, the stop-gradient marker of gradient routing, and what scales gradients behind it.

The marker sits in layers that run before the selection exists, so it cannot take the selected rows. A pass
over the joint graph resolves it; an unresolved marker must never train silently, so its backward raises.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from cggr_compile.ops.library import define_opaque


class UnresolvedMarkerError(RuntimeError):
    """A gradient passed through a detach_unselected marker that no pass has resolved."""


def detach_unselected_reference(x: Tensor, dim: int) -> Tensor:
    """Identity. ``x`` has the batch on axis 0 and the tokens on axis ``dim``.

    Its gradient is zero on every token that is not selected, and untouched on the others.
    """
    return x.clone()


def scale_selected_grads_reference(rows: Tensor, factors: Tensor) -> Tensor:
    """The selected rows, int64 [B, K]. Brings to the joint graph what the markers' gradients are multiplied with there.

    ``factors``: float32 [B, K].
    """
    return rows.clone()


def detach_unselected_backward_reference(grad: Tensor, dim: int) -> NoReturn:
    raise UnresolvedMarkerError(
        "a cggr::detach_unselected marker reached the backward pass unresolved: compile the graph with backend='cggr' "
        "(its joint-graph pass gives the marker its rows)"
    )


def _fake(x: Tensor, dim: int) -> Tensor:
    return torch.empty_like(x)


detach_unselected = define_opaque("detach_unselected(Tensor x, int dim) -> Tensor", detach_unselected_reference, _fake)
scale_selected_grads = define_opaque(
    "scale_selected_grads(Tensor rows, Tensor factors) -> Tensor",
    scale_selected_grads_reference,
    lambda rows, _: torch.empty_like(rows),
)
detach_unselected_backward = define_opaque(
    "detach_unselected_backward(Tensor grad, int dim) -> Tensor", detach_unselected_backward_reference, _fake
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.dim = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return detach_unselected_backward(grad, ctx.dim), None


torch.library.register_autograd("cggr::detach_unselected", _backward, setup_context=_setup)
