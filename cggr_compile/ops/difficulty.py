"""``cggr::difficulty``: how hard a token is, by the formula of a scoring."""

from __future__ import annotations

from torch import Tensor

from cggr_compile.ops.library import define_composite
from cggr_compile.scorings import SCORINGS

# every call has them; what else a formula reads is passed by name
ALWAYS = ("entropy", "top1", "top2", "label_logprob")


def difficulty_reference(
    entropy: Tensor, top1: Tensor, top2: Tensor, label_logprob: Tensor, scoring: str, **further: Tensor | None
) -> Tensor:
    """Difficulty per token, float32, same shape as the inputs.

    Args:
        entropy, top1, top2, label_logprob: of every token's distribution, as of ``cggr::score``.
        scoring: name of a record of :data:`cggr_compile.scorings.SCORINGS` that has a formula.
        further: what else that formula reads: logsumexp, doubled, reference_loss.

    Raises:
        ValueError: for another name.
    """
    formula = SCORINGS[scoring].formula if scoring in SCORINGS else None
    if formula is None:
        names = SCORINGS.names(lambda record: record.reads_head)
        raise ValueError(f"scoring must be one of {names}, got {scoring!r}")
    values = {**further, **dict(zip(ALWAYS, (entropy, top1, top2, label_logprob), strict=True))}
    return formula(**{name: values[name] for name in SCORINGS[scoring].inputs})


difficulty = define_composite(
    "difficulty(Tensor entropy, Tensor top1, Tensor top2, Tensor label_logprob, str scoring, *, "
    "Tensor? logsumexp=None, Tensor? doubled=None, Tensor? reference_loss=None) -> Tensor",
    difficulty_reference,
)
