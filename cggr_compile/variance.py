"""How much error the selection adds to the gradient: what ``min_tokens_ratio="auto"`` keeps under a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Every 17th number of a gradient is compared: an odd prime, so that all columns of a matrix have their turn.
_STRIDE = 17

# from a graph's arguments the gradient of every trainable one
Gradient = Callable[[Sequence[Any]], list[Tensor]]


class VarianceMeter:
    """Measures, every ``every`` steps, what the selection adds to the gradient's noise, on the user's own batches.

    As VCAS does (arXiv 2402.17227), the error of the sampling is held against the noise of the batches. One
    measurement takes three gradients at the same parameters: g(x), dense, of this step's batch x; g(x, s) of the same
    batch under a selection s of its own; and g(y), dense, of the batch y of the forward before. Then

        within = |g(x, s) - g(x)|^2,    between = |g(x) - g(y)|^2 / 2

    estimate E and V_batch: E is the expected squared error on a batch, the trace of the covariance over selections
    plus the squared bias that ``gradient="routed"`` has; V_batch the trace of the covariance of the dense gradient
    over batches. One number in 17 of every gradient enters, unscaled. Dropout is drawn alike for all three.

    What an optimiser makes of an error it does not know: a bias stays where noise averages out.

    A measurement costs three forward and backward passes, two of them dense, and, for its duration, the memory of 3/17
    of the gradients; it does not wait for the device.

    Args:
        every: steps from one measurement to the next.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._before: tuple[int, dict[int, Tensor]] | None = None  # step and batch of the forward to compare with

    def measure(
        self, step: int, args: Sequence[Any], gradients: Callable[[], tuple[Gradient, Gradient]]
    ) -> Tensor | None:
        """float32 [2], (within, between), on the device, if this forward is one to measure at; else None.

        Args:
            args: the captured graph's arguments.
            gradients: gives what differentiates it, densely and under a selection, if that is needed.
        """
        before, self._before = self._before, None
        figures = None
        if before is not None and step % self._every == 1 % self._every and before[0] in (step, step - 1):
            dense, selected = gradients()
            here = _sample(dense(args))
            other = _sample(dense([before[1].get(i, arg) for i, arg in enumerate(args)]))
            figures = torch.stack([_distance(_sample(selected(args)), here), _distance(here, other) / 2])
        if step % self._every == 0:
            # copies: the user may overwrite them with the next batch
            self._before = (step, {i: arg.clone() for i, arg in enumerate(args) if _is_data(arg)})
        return figures


def added(within: float, between: float) -> float | None:
    """E / V_batch from the two figures of a measurement; infinite where the batches do not differ."""
    if not (math.isfinite(within) and math.isfinite(between)):
        return None
    if within == 0.0:
        return 0.0
    return within / between if between > 0.0 else math.inf


def move(rung: float, ladder: Sequence[float], measured: float, ratio: float, bound: float) -> float:
    """The rung to train at next, at most one from ``rung``, so that the added error stays within ``bound``.

    Where tokens are drawn independently, its variance is proportional to 1 / ratio - 1: so the next lower rung's is
    predicted.

    Args:
        ladder: descending, the first one 1.0. measured: E / V_batch, measured at ``ratio``, a rung below 1.0.
    """
    position = list(ladder).index(rung)

    def expected(other: float) -> float:
        return measured * (1.0 / other - 1.0) / (1.0 / ratio - 1.0)

    if expected(rung) > bound and position > 0:
        return ladder[position - 1]
    if position + 1 < len(ladder) and expected(ladder[position + 1]) <= bound:
        return ladder[position + 1]
    return rung


def _sample(grads: list[Tensor]) -> list[Tensor]:
    """A part of every gradient, copied (a replayed CUDA graph overwrites what it returned): a vector for each device.

    Joined, because many small launches would cost as much as a step of a small model.
    """
    parts: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        parts.setdefault(grad.device, []).append(grad.detach().reshape(-1)[::_STRIDE])
    return [torch.cat(views).float() for views in parts.values()]


def _distance(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Sum of squared differences, on the first device."""
    device = left[0].device
    parts = [(a - b).square().sum().to(device, non_blocking=True) for a, b in zip(left, right, strict=True)]
    return torch.stack(parts).sum()


def _is_data(arg: Any) -> bool:
    return isinstance(arg, Tensor) and not arg.requires_grad and not isinstance(arg, torch.nn.Parameter)
