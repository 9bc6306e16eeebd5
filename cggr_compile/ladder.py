"""One captured graph at several ratios: each compiled when first needed, chosen on the host at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cggr_compile.schedule import round_up

Compiled = Callable[..., Any]


class Ladder:
    """The rungs of one captured graph.

    Args:
        compiled: the graph at the ratios that it is compiled for.
        waiting: for the others what compiles it, given the arguments of the first call that needs it.
        wanted: the ratio that the step about to run should have; it is rounded up to a rung.
    """

    def __init__(
        self,
        compiled: Mapping[float, Compiled],
        waiting: Mapping[float, Callable[[Sequence[Any]], Compiled]],
        wanted: Callable[[], float],
    ) -> None:
        self._compiled, self._waiting, self._wanted = dict(compiled), dict(waiting), wanted
        self._ratios = (*compiled, *waiting)

    def run(self, *args: Any) -> Any:
        """One call of the captured graph."""
        ratio = round_up(self._wanted(), self._ratios)
        if ratio not in self._compiled:
            self._compiled[ratio] = self._waiting[ratio](args)
            del self._waiting[ratio]  # and with it the rewritten graph
        return self._compiled[ratio](*args)
