"""Numbers that come from the device to the host without anybody waiting for them."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """One small tensor at a time on its way to the host.

    From a CUDA device it travels by an asynchronous copy into pinned memory, and :meth:`receive` asks an event
    whether it is there. From the CPU it arrives at the next call. Other devices have no such copy: there receiving
    waits for the device.
    """

    def __init__(self) -> None:
        self._host: Tensor | None = None
        self._event: torch.cuda.Event | None = None
        self._under_way = False

    def send(self, value: Tensor) -> bool:
        """Start the transfer of ``value`` (any shape). False if one is under way: then this one is dropped."""
        if self._under_way:
            return False
        if value.device.type == "cuda":
            if self._event is None or self._host is None or self._host.shape != value.shape:
                self._host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
                self._event = torch.cuda.Event()
            self._host.copy_(value.detach(), non_blocking=True)
            self._event.record(torch.cuda.current_stream(value.device))
        else:
            self._host = value.detach()
        self._under_way = True
        return True

    def receive(self) -> list[float] | None:
        """The numbers, once; None if nothing has arrived since."""
        if not self._under_way or (self._event is not None and not self._event.query()):
            return None
        self._under_way = False
        return self._numbers()

    def wait(self) -> list[float] | None:
        """The numbers under way, without receiving them; None if there are none. Waits for the device."""
        if self._under_way and self._event is not None:
            self._event.synchronize()
        return self._numbers() if self._under_way else None

    def restore(self, numbers: list[float]) -> None:
        """These are under way, as :meth:`wait` gave them."""
        self.clear()
        self._host, self._event, self._under_way = torch.tensor(numbers), None, True

    def peek(self) -> list[float] | None:
        """What :meth:`receive` would give now if the device were waited for; without receiving it."""
        return self.wait()

    def clear(self) -> None:
        """Forget what is under way."""
        self._under_way = False

    def _numbers(self) -> list[float]:
        assert self._host is not None
        numbers: list[float] = self._host.flatten().tolist()
        return numbers
