"""``selection="random"``."""

from __future__ import annotations

from cggr_compile.selections.importance import sample
from cggr_compile.selections.record import Selection

SELECTION = Selection(
    name="random",
    doc='at random, all equally likely; scores only feed the metrics, and `scoring="random"` spares the router',
    scores="unused",
    sampled=True,
    scopes=("sequence", "batch"),
    by_slots=sample,
)
