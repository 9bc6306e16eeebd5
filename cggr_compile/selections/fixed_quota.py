"""``selection="fixed_quota"``."""

from __future__ import annotations

from cggr_compile.selections import topk
from cggr_compile.selections.record import Selection

SELECTION = Selection(
    name="fixed_quota",
    doc="the hardest of every sequence, of each the same share; in the modules `dynamic_threshold` leaves it alone",
    scores="needed",
    sampled=False,
    follows_confidence=False,
    by_slots=topk.by_slots,
    by_share=topk.by_share,
)
