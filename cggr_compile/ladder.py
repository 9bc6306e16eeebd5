"""One captured graph at several ratios: each compiled when first needed, chosen on the host at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cggr_compile.schedule import round_up
from cggr_compile.variance import Gradient


@dataclass(frozen=True)
class Rung:
    """A compiled graph at one ratio: the training step, and what differentiates it beside that, if that is measured."""

    run: Callable[..., Any]
    gradient: Gradient | None = None


class Ladder:
    """The rungs of one captured graph.

    Args:
        compiled: the graph at the ratios that it is compiled for.
        waiting: for the others what compiles it, given the arguments of the first call that needs it.
        wanted: the ratio that the step about to run should have; it is rounded up to a rung.
        before: called with this ladder, the ratio and the arguments of every step before it runs.
    """

    def __init__(
        self,
        compiled: Mapping[float, Rung],
        waiting: Mapping[float, Callable[[Sequence[Any]], Rung]],
        wanted: Callable[[], float],
        before: Callable[[Ladder, float, Sequence[Any]], None] | None = None,
    ) -> None:
        self.ratios = tuple(sorted((*compiled, *waiting), reverse=True))
        self._compiled, self._waiting, self._wanted, self._before = dict(compiled), dict(waiting), wanted, before

    def rung(self, ratio: float, args: Sequence[Any]) -> Rung:
        """The graph at this ratio, compiled for ``args`` if it is needed for the first time."""
        if ratio not in self._compiled:
            self._compiled[ratio] = self._waiting[ratio](args)
            del self._waiting[ratio]  # and with it the rewritten graph
        return self._compiled[ratio]

    def run(self, *args: Any) -> Any:
        """One call of the captured graph."""
        ratio = round_up(self._wanted(), self.ratios)
        if self._before is not None:
            self._before(self, ratio, args)
        return self.rung(ratio, args).run(*args)
