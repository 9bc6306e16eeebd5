"""``cggr::stop_rows``: the stop-gradient marker of gradient routing, and ``cggr::weigh_stops``, its factors.

The marker sits in layers that run before the selection exists, so it cannot take the selected rows. A pass
over the joint graph resolves it; an unresolved marker must never train silently, so its backward raises.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from cggr_compile.ops.library import define_opaque


class UnresolvedMarkerError(RuntimeError):
    """A gradient passed through a stop_rows marker that no pass has resolved."""


def stop_rows_reference(x: Tensor, dim: int) -> Tensor:
    """Identity. ``x`` has the batch on axis 0 and the tokens on axis ``dim``.

    Its gradient is zero on every token that is not selected, and untouched on the others.
    """
    return x.clone()


def weigh_stops_reference(rows: Tensor, factors: Tensor) -> Tensor:
    """The selected rows, int64 [B, K]. Brings to the joint graph what the markers' gradients are multiplied with there.

    ``factors``: float32 [B, K].
    """
    return rows.clone()


def stop_rows_backward_reference(grad: Tensor, dim: int) -> NoReturn:
    raise UnresolvedMarkerError(
        "a cggr::stop_rows marker reached the backward pass unresolved: compile the graph with backend='cggr' "
        "(its joint-graph pass gives the marker its rows)"
    )


def _fake(x: Tensor, dim: int) -> Tensor:
    return torch.empty_like(x)


stop_rows = define_opaque("stop_rows(Tensor x, int dim) -> Tensor", stop_rows_reference, _fake)
weigh_stops = define_opaque(
    "weigh_stops(Tensor rows, Tensor factors) -> Tensor", weigh_stops_reference, lambda rows, _: torch.empty_like(rows)
)
stop_rows_backward = define_opaque(
    "stop_rows_backward(Tensor grad, int dim) -> Tensor", stop_rows_backward_reference, _fake
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.dim = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return stop_rows_backward(grad, ctx.dim), None


torch.library.register_autograd("cggr::stop_rows", _backward, setup_context=_setup)
