"""Counts the optimizer's updates of a parameter by the number of times that it has been written to."""

from __future__ import annotations

import weakref

from torch import Tensor

from cggr_compile import compat

# writes of one update, while that is not known: no optimizer of PyTorch's makes more
MOST_WRITES = 3


class Updates:
    """How many optimizer updates a trained parameter has had since a step was seen.

    One update writes to a parameter a fixed number of times (SGD once, AdamW twice), in whatever order steps and
    micro-batches come; that number is learned from the steps that are seen. Nothing waits for the device.
    """

    def __init__(self) -> None:
        self._parameter: weakref.ref[Tensor] | None = None
        self._version = 0
        self._writes: int | None = None  # of one update
        self._doubted: int | None = None

    def seen(self, parameter: Tensor) -> None:
        """A training step with this parameter is under way."""
        version = compat.version(parameter)
        if self._parameter is None or self._parameter() is not parameter:
            self._parameter, self._writes, self._doubted = weakref.ref(parameter), None, None
        elif (writes := version - self._version) > 0:
            # another number than usual, once: a checkpoint was loaded, or steps were missed; twice: another optimizer
            if self._writes is None or self._doubted == writes:
                self._writes = writes
            self._doubted = writes if writes != self._writes else None
        self._version = version

    def missed(self) -> int:
        """Updates since the step that was last seen, its own not counted; 0 before any was seen."""
        parameter = None if self._parameter is None else self._parameter()
        if parameter is None:
            return 0
        updates = -(-(compat.version(parameter) - self._version) // (self._writes or MOST_WRITES))
        return max(0, updates - 1)
