"""``selection="spans"``."""

from __future__ import annotations

from cggr_compile.ops.spans import span_sample
from cggr_compile.selections.record import Selected, Selection, SlotRequest


def by_slots(request: SlotRequest) -> Selected:
    cap = request.slots if request.whole_batch else None
    drawn = span_sample(request.scores, request.valid, request.state, request.budget, cap, request.options.span)
    return drawn[0], drawn[1]


SELECTION = Selection(
    name="spans",
    doc="every token of aligned blocks of at most `span` positions, drawn as `importance` draws tokens, by their mean "
    "score",
    scores="used",
    sampled=True,
    scopes=("sequence", "batch"),
    options=("span",),
    by_slots=by_slots,
)
