"""``selection="importance"``."""

from __future__ import annotations

from cggr_compile.ops.inclusion import inclusion_probabilities
from cggr_compile.ops.sample import systematic_sample
from cggr_compile.selections.record import Selected, Selection, SlotRequest


def sample(request: SlotRequest) -> Selected:
    """Every candidate with a probability that grows with its score; with equal ones where there are no scores."""
    cap = request.slots if request.whole_batch else None
    probabilities = inclusion_probabilities(request.scores, request.valid, request.budget, cap)
    return systematic_sample(probabilities, request.state), probabilities


SELECTION = Selection(
    name="importance",
    doc="at random, with probability p = r (1/2 + 1/2 score / mean score), at most 1; r makes the p of a sequence add "
    "up to its slots (systematic sampling)",
    scores="used",
    sampled=True,
    scopes=("sequence", "batch"),
    by_slots=sample,
)
