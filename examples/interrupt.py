"""Ctrl-C that is never lost."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Interrupt:
    """While entered, SIGINT raises KeyboardInterrupt and is remembered for :meth:`check`.

    Python only prints an exception that is raised inside a destructor or a weak reference's callback, and a compiled
    step runs many of those: without the second look about one Ctrl-C in a few hundred would do nothing.
    """

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if SIGINT came since :meth:`__enter__`; call it once a step."""
        if self.requested:
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        raise KeyboardInterrupt
