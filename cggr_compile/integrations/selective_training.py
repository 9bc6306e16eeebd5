"""The backend on the model of a training loop: what the callbacks of all trainers share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch.nn import Module

from cggr_compile import compat
from cggr_compile.errors import OptionError
from cggr_compile.integrations.dora import trace_dora
from cggr_compile.integrations.training_call import TrainingCall, compiled_part
from cggr_compile.metrics_logger import MetricsLogger, Sink
from cggr_compile.options import Options
from cggr_compile.registry import registry
from cggr_compile.runtime import FallbackWarning, Runtime

# what a trainer logs of Runtime.metrics()
FIGURES = ("ratio", "token_ratio", "level", "labels_overflow", "context_overflow")


class SelectiveTraining:
    """Attaches the backend to a model, counts its steps, and carries its state from run to run.

    Args:
        options: see :class:`cggr_compile.Options`, without ``advance``.

    Attributes:
        runtime: of the model; None before :meth:`attach`, and where it refused.

    Raises:
        ValueError: for an unknown option, a value out of range, or ``advance``.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        if "advance" in options:
            raise OptionError("advance must be left out: the callback counts the steps of the optimizer")
        self.options = Options.parse({**options, "advance": "manual"})
        self.given = dict(options)
        self.runtime: Runtime | None = None
        self._module: Module | None = None
        self._saved: Mapping[str, Any] | None = None
        self._refused = False

    def attach(
        self,
        module: Module,
        *,
        static_sizes: bool = False,
        defaults: Mapping[str, Any] | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> bool:
        """Compile ``module`` in place, whatever is wrapped around it. Done already, this changes nothing.

        Args:
            static_sizes: make a graph for every size of a batch.
            defaults: options that hold where none was given.
            before: called before every training forward.

        Returns:
            whether it is compiled: not if it, or a part of it, is compiled already.

        Raises:
            OptionError: where it cannot be, if ``fallback`` is ``error``.
        """
        if (other := compiled_part(module)) is not None:
            self.refuse(
                f"the model is compiled already ({type(compat.original_module(other)).__name__}): give the trainer one "
                "that is not, without torch_compile and the like; the callback compiles it"
            )
            return False
        if self._module is not module:
            trace_dora(module)
            options = {**(defaults or {}), **self.given, "advance": "manual"}
            dynamic = False if static_sizes else None
            call = TrainingCall(module, options, dynamic=dynamic, before=before)
            compat.set_compiled_call(module, call)
            self._module, self.runtime = module, registry.of_module(module)
        self._load()
        return True

    def refuse(self, reason: str) -> None:
        """Say once why training goes on as it is.

        Raises:
            OptionError: if ``fallback`` is ``error``.
        """
        if self.options.fallback == "error":
            raise OptionError(f"the backend cannot be used here and fallback='error': {reason}")
        if self.options.fallback != "silent" and not self._refused:
            warnings.warn(f"cggr: training goes on as it is: {reason}", FallbackWarning, stacklevel=2)
        self._refused = True

    def step(self) -> None:
        """The optimizer has taken a step."""
        if self.runtime is not None:
            self.runtime.step()

    def log(self, sink: Sink, more: Mapping[str, Any] | None = None, *, numbers: bool = False) -> None:
        """Hand ``FIGURES`` of the last training forward on this process to a logger. Waits for the device.

        Args:
            sink, numbers: as those of :class:`cggr_compile.MetricsLogger`. more: further values, by their whole names.
        """
        metrics = (lambda: {"level": "dense"}) if self.runtime is None else self.runtime.metrics
        MetricsLogger(metrics, sink, figures=FIGURES, numbers=numbers).log(**(more or {}))

    def state_dict(self) -> dict[str, Any] | None:
        """What resuming needs, as :meth:`Runtime.state_dict`; None if nothing was trained."""
        if self.runtime is None:
            return None if self._saved is None else dict(self._saved)
        return self.runtime.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Resume from :meth:`state_dict` of any process, now or once the model is there.

        Raises:
            ValueError: as :meth:`Runtime.load_state_dict`.
        """
        self._saved = state
        self._load()

    def _load(self) -> None:
        if self.runtime is not None and self._saved is not None:
            self.runtime.load_state_dict(self._saved)
            self._saved = None
