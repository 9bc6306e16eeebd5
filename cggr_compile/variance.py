"""How much error the selection adds to the gradient: what ``min_tokens_ratio="auto"`` keeps under a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Every 17th number of a gradient is compared: an odd prime, so that all columns of a matrix have their turn.
_STRIDE = 17
# how many figures a measurement has
FIGURES = 2


class Gradients(NamedTuple):
    """Of every trainable argument of a graph; and ``cggr::gradient_moments`` of the rows, where they are known."""

    grads: list[Tensor]
    moments: Tensor | None = None


# from a graph's arguments
Gradient = Callable[[Sequence[Any]], Gradients]


class Measurement(NamedTuple):
    """``figures``: float32 [2], (within, between); ``moments``: those of the selection. Both on the device."""

    figures: Tensor
    moments: Tensor | None = None


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
    ) -> Measurement | None:
        """What is found if this forward is one to measure at; else None.

        Args:
            args: the captured graph's arguments.
            gradients: gives what differentiates it, densely and under a selection, if that is needed.
        """
        before, self._before = self._before, None
        found = None
        if before is not None and step % self._every == 1 % self._every and before[0] in (step, step - 1):
            dense, selected = gradients()
            here = _sample(dense(args).grads)
            other = _sample(dense([before[1].get(i, arg) for i, arg in enumerate(args)]).grads)
            drawn = selected(args)
            figures = torch.stack([_distance(_sample(drawn.grads), here), _distance(here, other) / 2])
            found = Measurement(figures, drawn.moments)
        if step % self._every == 0:
            # copies: the user may overwrite them with the next batch
            self._before = (step, {i: arg.clone() for i, arg in enumerate(args) if _is_data(arg)})
        return found


def added(within: float, between: float) -> float | None:
    """E / V_batch from the two figures of a measurement; infinite where the batches do not differ."""
    if not (math.isfinite(within) and math.isfinite(between)):
        return None
    if within == 0.0:
        return 0.0
    return within / between if between > 0.0 else math.inf


def move(
    rung: float, ladder: Sequence[float], expected: Callable[[float], float], bound: float, margin: float = 1.0
) -> float:
    """The rung to train at next, at most one from ``rung``, so that the added error stays within ``bound``.

    Args:
        ladder: descending, the first one 1.0.
        expected: E / V_batch at a ratio below 1.0, see :class:`cggr_compile.variance_prediction.VariancePrediction`.
        margin: how many times the bound has to be exceeded, or the next lower rung's error fit in it.
    """
    position = list(ladder).index(rung)
    if position > 0 and expected(rung) > margin * bound:
        return ladder[position - 1]
    if position + 1 < len(ladder) and margin * expected(ladder[position + 1]) <= bound:
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
