"""``cggr::systematic_sample`` and ``cggr::stratified_sample``: random selections, and what they weigh."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.inclusion import ONE
from cggr_compile.ops.library import define_composite
from cggr_compile.ops.ranking import comparable, inverse, ranks
from cggr_compile.ops.uniform import uniform_reference


def systematic_sample_reference(probabilities: Tensor, state: Tensor) -> Tensor:
    """Selects every position i with probability p_i: systematic sampling over a random permutation.

    The p_i of a sequence are laid end to end, in random order; those that a multiple of 1 falls into, counted from a
    random start, are selected. (Madow, Annals of Mathematical Statistics 20, 1949.) So a sequence gets as many
    as its p_i add up to, rounded up or down.

    Args:
        probabilities: float32 [B, S], multiples of 2**-24 in [0, 1].
        state: int64 [2], (seed, step).

    Returns:
        bool [B, S].
    """
    batch, length = probabilities.shape
    draws = uniform_reference(state, probabilities.new_empty(batch, length + 1))
    order = draws[:, :length].sort(dim=1, stable=True).indices
    start = (draws[:, length:] * ONE).long()
    hit = _hits((probabilities.gather(1, order) * ONE).long(), start)
    return hit.gather(1, inverse(order))


def _hits(sizes: Tensor, start: Tensor) -> Tensor:
    """Which of the intervals laid end to end from ``start`` a multiple of ONE falls into."""
    end = sizes.cumsum(1) + start
    return end // ONE > (end - sizes) // ONE


def stratified_sample_reference(
    scores: Tensor, valid: Tensor, state: Tensor, slots: int, strata: int
) -> tuple[Tensor, Tensor]:
    """As many random candidates from every stratum of the score ranking, per sequence.

    The candidates are ranked by score, cut into ``strata`` parts of equal size, and in each part every one is
    equally likely. What does not divide evenly, candidates or slots, goes to the first parts, those with the highest
    scores. A sequence with fewer slots or candidates than strata has that many strata.

    Args:
        scores: float [B, S]; a score that is not finite counts as the lowest. valid: bool [B, S], the candidates.
        state: int64 [2], (seed, step).
        slots: of a sequence, which uses no more than it has candidates. strata: >= 1.

    Returns:
        the selection, bool [B, S], and each candidate's probability to be in it, float32 [B, S].
    """
    count = valid.sum(1, keepdim=True)
    quota = count.clamp(max=slots)
    strata_of = quota.clamp(min=1, max=strata)

    def part_of(rank: Tensor) -> Tensor:
        """The part that a rank is in, where the first ``count % strata`` parts have one candidate more."""
        size, longer = count // strata_of, count % strata_of
        head = longer * (size + 1)
        return torch.where(rank < head, rank // (size + 1), longer + (rank - head).clamp(min=0) // size.clamp(min=1))

    part = part_of(ranks(comparable(scores, valid), descending=True))
    # second ranking: by part, and inside it at random; what is no candidate comes last
    key = (part << 24) + (uniform_reference(state, scores) * ONE).long()
    key = key.masked_fill(~valid, torch.iinfo(torch.int64).max)
    rank = ranks(key)
    begin = part * (count // strata_of) + torch.minimum(part, count % strata_of)
    size = count // strata_of + (part < count % strata_of)
    taken = quota // strata_of + (part < quota % strata_of)
    mask = valid & (rank - begin < taken)
    return mask, torch.where(valid, taken / size.clamp(min=1), 0.0)


systematic_sample = define_composite(
    "systematic_sample(Tensor probabilities, Tensor state) -> Tensor", systematic_sample_reference
)
stratified_sample = define_composite(
    "stratified_sample(Tensor scores, Tensor valid, Tensor state, SymInt slots, int strata) -> (Tensor, Tensor)",
    stratified_sample_reference,
)
