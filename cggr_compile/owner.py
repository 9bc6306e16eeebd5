"""Whose step a compiled graph runs: models of one class share Dynamo's graphs, but not their runtimes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.nn import Parameter

from cggr_compile.options import Options
from cggr_compile.report import GraphReport
from cggr_compile.runtime import Runtime, runtime_of


class Owner:
    """Follows the calls of one captured graph to the model that each is for.

    Dynamo passes parameters in as arguments, so a second model of the same class, say of the next run of a sweep, runs
    the graph that the first one was captured with. Parameters that are no ``nn.Parameter`` (a functional model's) may
    be other tensors in every step: such a graph stays with the runtime it was captured for.

    Attributes:
        runtime: of the model that the last call was for.
    """

    def __init__(self, runtime: Runtime, inputs: Sequence[Any]) -> None:
        self.runtime = runtime
        self._position = next((i for i, value in enumerate(inputs) if _trained(value)), None)
        self._begun: list[tuple[GraphReport, Options]] = []

    def begin(self, report: GraphReport, options: Options) -> None:
        """A form of the graph has been rewritten."""
        self._begun.append((report, options))
        self.runtime.begin(report, options)

    def before(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, after a look at whose parameters it is called with."""
        position = self._position
        if position is None:
            return run

        def run_for(*args: Any) -> Any:
            found = runtime_of((args[position],))
            if found is not self.runtime:
                self.runtime = found
                for report, options in self._begun:
                    if report not in found.reports:
                        found.begin(report, options)
            return run(*args)

        return run_for


def _trained(value: Any) -> bool:
    return isinstance(value, Parameter) and value.requires_grad
