"""The predictors of several processes become one again, every few steps, without a collective.

Each process trains its predictors on its own rows, from the same beginning. At the first step of a period all send
their parameters, and take up the mean of them some steps later, in the same step everywhere: each adds to what it has
learned meanwhile what the mean is ahead of what it sent. Adam's moments and the decayed sums stay a process's own.

Whatever they predict, the loss's estimate has no bias: so nobody waits for a process that does not come, and the
predictors need not be equal in every bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cggr_compile.ops.predictor import parameters_of, with_parameters
from cggr_compile.passes.step_interface import PredictorKey
from cggr_compile.shared_readback import SharedReadback

# steps from one exchange to the next
PERIOD = 64
States = Mapping[PredictorKey, Tensor]


class PredictorExchange:
    """What one process sends, and makes of what it gets.

    Args:
        shared: with :func:`mean_of` for ``combine``.
    """

    def __init__(self, shared: SharedReadback) -> None:
        self._shared = shared
        self._sent: dict[PredictorKey, Tensor] = {}

    def after(self, states: States) -> dict[PredictorKey, Tensor]:
        """What the predictors are after a step that has made these of them. Does not wait for the device."""
        found = dict(states)
        if self._shared.alone:
            return found
        mean = self._shared.receive()
        if mean is not None:
            self._take(found, mean)
        if self._shared.due and states:
            sent = {key: parameters_of(state).half() for key, state in states.items()}
            if self._shared.send(_packed(torch.cat(list(sent.values())))):
                self._sent = sent
        return found

    def _take(self, states: dict[PredictorKey, Tensor], numbers: list[float]) -> None:
        sent, self._sent = self._sent, {}
        packed = torch.tensor(numbers, dtype=torch.int32)
        sizes = [own.numel() for own in sent.values()]
        if packed.numel() != (sum(sizes) + 1) // 2 or not sizes:  # others predict for other graphs
            return
        device = next(iter(sent.values())).device
        packed = packed.pin_memory() if device.type == "cuda" else packed
        means = packed.to(device, non_blocking=True).view(torch.float16)[: sum(sizes)].split(sizes)
        for (key, own), mean in zip(sent.items(), means, strict=True):
            if key in states:
                ahead = mean.float() - own.float()
                states[key] = with_parameters(states[key], parameters_of(states[key]) + ahead)


def _packed(values: Tensor) -> Tensor:
    """float16 as int32, two in each."""
    return pad(values, (0, values.numel() % 2)).view(torch.int32)


def mean_of(values: list[Any]) -> list[int] | None:
    """Of the packed parameters of those processes that have sent some; None where they do not fit together."""
    sent = [torch.tensor(value, dtype=torch.int32).view(torch.float16).float() for value in values if value is not None]
    if not sent or len({one.numel() for one in sent}) > 1:
        return None
    packed: list[int] = torch.stack(sent).mean(0).half().view(torch.int32).tolist()
    return packed
