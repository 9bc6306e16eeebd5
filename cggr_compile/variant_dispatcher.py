"""The variants of one captured graph: each compiled when first needed, chosen on the host at every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cggr_compile.compiled_variant import CompiledVariant
from cggr_compile.schedule import round_up

# ratio, and how often slots are doubled
Key = tuple[float, int]


class VariantDispatcher:
    """The compiled variants by their ratio, and by how often their slots are doubled.

    Args:
        compiled: the graph at the ratios and doublings that it is compiled for.
        waiting: for the others what compiles it, given the arguments of the first call that needs it.

    Attributes:
        ratios: those there are, in descending order.
        grow: whether slots may be doubled.
    """

    def __init__(
        self,
        compiled: Mapping[Key, CompiledVariant],
        waiting: Mapping[Key, Callable[[Sequence[Any]], CompiledVariant]] | None = None,
    ) -> None:
        self._compiled, self._waiting = dict(compiled), dict(waiting or {})
        self._growths = Counter(ratio for ratio, _ in (*self._compiled, *self._waiting))
        self.ratios = tuple(sorted(self._growths, reverse=True))
        self.grow = max(self._growths.values()) > 1

    def nearest(self, ratio: float) -> float:
        """The ratio, of those there are, that a step runs at which should have this one: it is rounded up."""
        return round_up(ratio, self.ratios)

    def at(self, ratio: float, args: Sequence[Any], growth: int = 0) -> CompiledVariant:
        """The graph at a ratio of ``ratios``, its slots doubled ``growth`` times, or as often as they can be.

        Compiled for ``args`` if it is needed for the first time.
        """
        key = ratio, min(growth, self._growths[ratio] - 1)
        if key not in self._compiled:
            self._compiled[key] = self._waiting[key](args)
            del self._waiting[key]  # and with it the rewritten graph
        return self._compiled[key]
