"""Which tokens are selected, as a mask: the number of them is a tensor, the shapes never change."""

from __future__ import annotations

from torch import Tensor

from cggr_compile.selections import SELECTIONS
from cggr_compile.selections.record import SelectionOptions, ShareRequest


def token_mask(
    selection: str, difficulty: Tensor, valid: Tensor, ratio: Tensor, step: Tensor, options: SelectionOptions
) -> Tensor:
    """bool [B, S]: the selected ones of the ``valid`` tokens, exactly as many as asked for, also among ties.

    Where there is a candidate, one at least is selected: of the batch, for ``topk`` and ``fixed_quota`` of every
    sequence. ``ratio`` 1.0 selects them all.

    Args:
        selection: see :class:`cggr_compile.modules.settings.Settings`.
        difficulty: float32 [B, S]. valid: bool [B, S], the candidates.
        ratio: float32 [], share of the candidates in (0, 1]; rounded up to whole tokens.
        step: int64 [], seeds what is random.
        options: num_strata and min_tokens_per_sequence.
    """
    select = SELECTIONS[selection].by_share
    assert select is not None
    return select(ShareRequest(difficulty, valid, ratio, step, options))[0]
