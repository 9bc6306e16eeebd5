"""Numbers from the devices of all processes, known to each of them at the same step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from cggr_compile.agreement import Agreement
from cggr_compile.readback import Readback

# Steps from the first of a period to the post, from there to the combination, and to the result. Hosts are a step or
# two ahead of their devices, and may be as many apart.
LAG = 4
# steps from one decision to the next where nothing else says
PERIOD = 32
Combine = Callable[[list[Any]], Any]


def sums(values: list[Any]) -> list[float] | None:
    """Elementwise, of the processes that have sent something (others are None); None if none has."""
    sent = [value for value in values if value is not None]
    return [sum(column) for column in zip(*sent, strict=False)] if sent else None


class SharedReadback(Readback):
    """A :class:`Readback` that gives every process the numbers of all, at fixed steps.

    What is sent at the first step of a period (``step % period == offset``) is posted ``LAG`` steps later, when it has
    long arrived, combined after as many again, and received after the third time: so processes that are up to ``LAG``
    steps apart do not wait for each other. A process that has sent nothing takes part with None. In all other steps
    nothing is sent, and nobody asked. Where every process decides for itself it is a plain :class:`Readback`.

    Args:
        combine: gives the numbers (or None) that all receive, from the list of what each has sent.
        step: says which step it is, the same in all processes.
        period: steps, or so many times them that a decision fits in. offset: of the first step of a period.
    """

    def __init__(
        self,
        agreement: Agreement,
        topic: str,
        combine: Combine,
        step: Callable[[], int],
        period: int = PERIOD,
        offset: int = 0,
    ) -> None:
        super().__init__()
        self._agreement, self._topic, self._combine, self._step = agreement, topic, combine, step
        self._period, self._offset = period * (3 * LAG // period + 1) if period <= 3 * LAG else period, offset
        self._current: int | None = None  # the period under way
        self._done = self._number = 0  # of post, combine, receive; of the post

    @property
    def _place(self) -> tuple[int, int]:
        """The period, and the step in it."""
        return divmod(self._step() - self._offset, self._period)

    @property
    def alone(self) -> bool:
        """Whether this process decides for itself."""
        return self._agreement.alone

    @property
    def due(self) -> bool:
        """Whether something is sent in this step."""
        return self.alone or self._place[1] == 0

    def send(self, value: Tensor) -> bool:
        return self.due and super().send(value)

    def advance(self) -> None:
        """To be called at every step."""
        period, phase = self._place
        if self._agreement.alone or period < 0:
            return
        if period != self._current:
            if self._current is not None:
                super().clear()  # nobody has received it
            self._current, self._done = period, 0
        if self._done == 0 and phase >= LAG:
            self._number = self._agreement.post(self._topic, super().wait())
            self._done = 1
        if self._done == 1 and phase >= 2 * LAG:
            self._agreement.combine(self._topic, self._number, self._combine)
            self._done = 2

    def receive(self) -> list[float] | None:
        if self._agreement.alone:
            return super().receive()
        if self._done != 2 or self._place[1] < 3 * LAG:
            return None
        super().clear()
        self._done = 3
        numbers: Sequence[float] | None = self._agreement.take(self._topic, self._number)
        return None if numbers is None else list(numbers)

    def peek(self) -> list[float] | None:
        return super().peek() if self._agreement.alone else None

    def clear(self) -> None:
        super().clear()
        self._current = None
