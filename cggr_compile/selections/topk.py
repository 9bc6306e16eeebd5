"""``selection="topk"``."""

from __future__ import annotations

from cggr_compile.ops.hardest import hardest, hardest_of_batch, hardest_reference
from cggr_compile.selections.record import Selected, Selection, ShareRequest, SlotRequest


def by_slots(request: SlotRequest) -> Selected:
    if request.whole_batch:
        return hardest_of_batch(request.scores, request.valid, request.budget, request.slots, 0), None
    return hardest(request.scores, request.valid, request.slots), None


def by_share(request: ShareRequest) -> Selected:
    """The most difficult tokens of every sequence, of each the same share."""
    return hardest_reference(request.scores, request.valid, request.number), None


SELECTION = Selection(
    name="topk",
    doc='the hardest of every sequence (of the whole batch only if `scope="batch"` asks for it)',
    scores="needed",
    sampled=False,
    scopes=("sequence", "batch"),
    by_slots=by_slots,
    by_share=by_share,
)
