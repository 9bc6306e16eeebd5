"""What a selection would add at other ratios, and adds by now, given what was measured; and whether that pays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cggr_compile.relative_variance import RelativeVariance, dense_share

# Of V - 1. Where it is less nearly every token with a label is drawn: then what was measured is mostly bias and noise.
_LEAST = 0.05
# how many times the squared error of a dense share a selection has to have, to be called worse
_WORSE = 1.1


@dataclass(frozen=True)
class VariancePrediction:
    """E / V_batch (see :class:`cggr_compile.variance.VarianceMeter`) at any ratio below 1.0.

    What was measured at one ratio is held against what the tokens' gradients alone let expect there, V - 1 of
    :class:`RelativeVariance`. That changes with the ratio, and from step to step, and what was measured is taken to
    change with it. Where the gradients are not known V - 1 is that of random tokens, 1 / ratio - 1.

    Attributes:
        measured: E / V_batch at ``ratio``, below 1.0.
        then, now: what the tokens' gradients let expect when it was measured, and lately; None if unknown.
    """

    measured: float
    ratio: float
    then: RelativeVariance | None = None
    now: RelativeVariance | None = None

    def at(self, ratio: float) -> float:
        """With the scores that there are."""
        return self._scaled(lambda variance: variance.added(ratio), ratio)

    def least(self, ratio: float) -> float | None:
        """With the best scores; None if unknown."""
        return self._scaled(lambda variance: variance.least(ratio), ratio) if self._known else None

    @property
    def _known(self) -> bool:
        return self.now is not None and self.then is not None and self.then.added(self.ratio) > _LEAST

    def _scaled(self, expected: Callable[[RelativeVariance], float], ratio: float) -> float:
        if self._known:
            assert self.then is not None and self.now is not None
            now, then = expected(self.now), self.then.added(self.ratio)
        else:
            now, then = 1.0 / ratio - 1.0, 1.0 / self.ratio - 1.0
        return self.measured * (now / then) if now > 0.0 else 0.0  # the measured may be infinite


def advice(found: VariancePrediction, ratio: float, trains: bool, learned: bool) -> str:
    """What to say where dense training on a part of the batch would be better; empty where it would not.

    Args:
        ratio: below 1.0. trains: whether steps run at it; else at 1.0, and this is the next one.
        learned: whether tokens are drawn by ``scoring="learned"`` already.
    """
    share = dense_share(ratio)
    of_selection, of_share = 1.0 + found.at(ratio), 1.0 / share
    if not _WORSE * of_share < of_selection < math.inf:  # it is infinite where batches do not differ
        return ""
    text = (
        f"min_tokens_ratio='auto': at ratio {ratio:g}, {'which it trains at' if trains else 'the next one'}, the "
        f"gradient has {of_selection:.2f} times the squared error of a whole batch's, as measured; dense training on "
        f"{share:.0%} of each batch takes about as long and has {of_share:.2f} times. "
    )
    least, smaller = found.least(ratio), "a smaller batch with min_tokens_ratio=1.0 is better"
    if least is None or found.now is None:
        return f"{text}So {smaller}"
    text += f"The best scores would have {1.0 + least:.2f} (concentration {found.now.concentration:.2f}): "
    if learned or 1.0 + least > of_share:
        return text + smaller
    return f"{text}selection='importance' with scoring='learned' may come nearer to them; else {smaller}"
