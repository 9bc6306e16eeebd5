"""The variants of one captured graph: each compiled when first needed, chosen on the host at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cggr_compile.compiled_variant import CompiledVariant
from cggr_compile.schedule import round_up


class VariantDispatcher:
    """The compiled variants by their ratio.

    Args:
        compiled: the graph at the ratios that it is compiled for.
        waiting: for the others what compiles it, given the arguments of the first call that needs it.
    """

    def __init__(
        self,
        compiled: Mapping[float, CompiledVariant],
        waiting: Mapping[float, Callable[[Sequence[Any]], CompiledVariant]] | None = None,
    ) -> None:
        self._compiled, self._waiting = dict(compiled), dict(waiting or {})
        self.ratios = tuple(sorted((*self._compiled, *self._waiting), reverse=True))

    def nearest(self, ratio: float) -> float:
        """The ratio, of those there are, that a step runs at which should have this one: it is rounded up."""
        return round_up(ratio, self.ratios)

    def at(self, ratio: float, args: Sequence[Any]) -> CompiledVariant:
        """The graph at a ratio of ``ratios``, compiled for ``args`` if it is needed for the first time."""
        if ratio not in self._compiled:
            self._compiled[ratio] = self._waiting[ratio](args)
            del self._waiting[ratio]  # and with it the rewritten graph
        return self._compiled[ratio]
