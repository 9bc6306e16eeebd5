"""``selection="sequence_aware"``."""

from __future__ import annotations

import torch

from cggr_compile.ops.hardest import hardest_of_batch, hardest_reference
from cggr_compile.selections.record import Selected, Selection, ShareRequest, SlotRequest


def by_slots(request: SlotRequest) -> Selected:
    least = torch.sym_min(request.options.min_tokens_per_sequence, request.slots)
    budget = torch.sym_max(request.budget, least)
    return hardest_of_batch(request.scores, request.valid, budget, request.slots, least), None


def by_share(request: ShareRequest) -> Selected:
    """The most difficult tokens of the batch, and at least ``min_tokens_per_sequence`` of every sequence."""
    scores, valid = request.scores.reshape(1, -1), request.valid.reshape(1, -1)
    of_batch = hardest_reference(scores, valid, request.quota(valid.sum())).view(request.valid.shape)
    return of_batch | hardest_reference(request.scores, request.valid, request.options.min_tokens_per_sequence), None


SELECTION = Selection(
    name="sequence_aware",
    doc="the hardest of the batch, at least `min_tokens_per_sequence` of each sequence",
    scores="needed",
    sampled=False,
    scopes=("batch",),
    options=("min_tokens_per_sequence", "max_selected"),
    by_slots=by_slots,
    by_share=by_share,
)
