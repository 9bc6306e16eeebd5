"""Ctrl-C that is never lost."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType


class Interrupt:
    """While entered, SIGINT raises KeyboardInterrupt and is remembered for :meth:`check`.

    Python only prints an exception that is raised inside a destructor or a weak reference's callback, and a compiled
    step runs many of those: without the second look about one Ctrl-C in a few hundred would do nothing.

    ``patient``: the first SIGINT raises nothing, so that no step is left half done. Look at ``requested`` between the
    steps. The second one raises.
    """

    def __init__(self, patient: bool = False) -> None:
        self.requested = False
        self.patient = patient

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
        wait = self.patient and not self.requested
        self.requested = True
        if not wait:
            raise KeyboardInterrupt
        # print() may be what was interrupted, and must not be entered twice
        os.write(2, b"\nStopping after this step. Ctrl-C again stops at once, and loses what was not saved.\n")
