"""``scoring="random"``."""

from __future__ import annotations

from cggr_compile.scorings.record import Scoring

SCORING = Scoring(name="random", doc="none: no router runs, and `importance` draws like `random`", formula=None)
