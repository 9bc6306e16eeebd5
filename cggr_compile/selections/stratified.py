"""``selection="stratified"``."""

from __future__ import annotations

import torch

from cggr_compile.ops.inclusion import ONE
from cggr_compile.ops.ranking import comparable, ranks
from cggr_compile.ops.sample import stratified_sample
from cggr_compile.ops.uniform import uniform
from cggr_compile.selections.record import Selected, Selection, ShareRequest, SlotRequest


def by_slots(request: SlotRequest) -> Selected:
    strata = request.options.num_strata
    drawn = stratified_sample(request.scores, request.valid, request.state, request.slots, strata)
    return drawn[0], drawn[1]


def by_share(request: ShareRequest) -> Selected:
    """The same share, at random, of each of ``num_strata`` equal parts of the batch's candidates, in order of
    difficulty: on average all tokens alike."""
    strata, shape = request.options.num_strata, request.valid.shape
    valid = request.valid.reshape(1, -1)
    count = valid.sum()
    rank = ranks(comparable(request.scores.reshape(1, -1), valid), descending=True)
    stratum = torch.where(valid, rank * strata // count.clamp(min=1), strata)
    # stratum j begins at rank ceil(j * count / strata); a last, empty one takes what is no candidate
    begins = -(-torch.arange(strata + 1, device=rank.device) * count // strata)
    quota = request.quota(begins.diff())
    noise = (uniform(request.state, request.valid).reshape(1, -1) * ONE).long()
    shuffled = ranks(stratum * ONE + noise)
    inside = stratum.clamp(max=strata - 1)
    mask = shuffled - begins[inside] < quota[inside]
    return request.valid & mask.view(shape), None


SELECTION = Selection(
    name="stratified",
    doc="the same number at random from each of `num_strata` equal parts of the score ranking",
    scores="needed",
    sampled=True,
    options=("num_strata",),
    by_slots=by_slots,
    by_share=by_share,
)
