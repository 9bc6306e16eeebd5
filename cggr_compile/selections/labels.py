"""``selection="labels"``."""

from __future__ import annotations

from cggr_compile.selections.importance import sample
from cggr_compile.selections.record import Selection

SELECTION = Selection(
    name="labels",
    doc="every token that has a label (the rest is -100: answers in fine-tuning, masked tokens); a random part where "
    'there are more than `max_selected`, which `metrics()["labels_overflow"]` counts; scores only feed the metrics',
    scores="unused",
    sampled=True,
    takes_all=True,
    options=("max_selected",),
    by_slots=sample,
)
