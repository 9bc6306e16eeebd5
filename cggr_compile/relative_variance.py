"""Variance of a gradient from a part of the tokens, relative to that from all of them; and what costs as much.

g = |softmax - onehot| of a token, n candidates, of which k are selected, each with a probability p and weight 1/p.
Take the gradients of the tokens to be independent. All tokens give an estimate of the mean gradient whose variance is
sum g^2 / n^2, and a selection one of sum g^2 / p / n^2 (both terms: what the data and what the drawing add). So

- a selection has V = (sum g^2 / p) / sum g^2 times the variance of all tokens, and adds V - 1;
- p = k / n, a random choice, has V = n / k;
- p in proportion to g, the best choice, has V = n / k * c, where c = (mean g)^2 / mean g^2 is the concentration (no p
  of k tokens has less, by Cauchy-Schwarz);
- scores that know g in part lie between: their V * k / n is from c to 1, or above it if they are worse than none;
- a share s of the batch, trained on densely, has V = 1 / s.

Gradients of the tokens of one text are not independent, so whole batches vary more than sum g^2 / n^2, and what a
selection adds is a part of V - 1 only: ``min_tokens_ratio="auto"`` measures how much, see :class:`VarianceMeter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cggr_compile.ops.gradient_moments import MOMENTS

# where each is in the sums
ROWS, W, G, GG, V = range(MOMENTS)


def dense_share(ratio: float) -> float:
    """The share of a batch that is trained on densely in about the time of a selection of ``ratio``.

    A forward pass takes a third of a dense step, and a selection saves the rest in proportion, as far as that works on
    positions: 1/3 + 2/3 ratio, a half at a quarter (0.50 to 0.53 was measured there, see docs/quality.md). A router
    takes more than that, a large head less.
    """
    return (1.0 + 2.0 * ratio) / 3.0


def normalised(moments: Tensor, ratio: float) -> Tensor:
    """Sums of a step at ``ratio`` so that steps add up: each counts alike, at whatever ratio.

    Divided by the sum of weights; then the number of rows is per unit of the ratio, and the sum of w^2 g^2 times the
    share that was drawn. Without a label they are zeros.

    Args:
        moments: float32 [5], ``cggr::gradient_moments``. Stays on its device.
    """
    step = moments.detach() / moments.detach()[W].clamp(min=1e-12)
    step[V].mul_(step[ROWS])
    step[ROWS].div_(ratio)
    return step


@dataclass(frozen=True)
class RelativeVariance:
    """What a sum of :func:`normalised` steps says.

    Attributes:
        concentration: c, in (0, 1].
        achieved: V * k / n of the scores: 1 of none, c of the best.
        drawn: k / n per unit of the ratio, as long as fewer than all are drawn.
    """

    concentration: float
    achieved: float
    drawn: float

    @classmethod
    def of(cls, sums: Sequence[float]) -> RelativeVariance | None:
        """None where no token had a gradient."""
        product = sums[W] * sums[GG]
        if not product > 0.0:
            return None
        return cls(min(1.0, sums[G] ** 2 / product), sums[V] / sums[GG], sums[ROWS] / sums[W])

    def added(self, ratio: float) -> float:
        """V - 1 of a selection with these scores."""
        return self._added(self.achieved, ratio)

    def least(self, ratio: float) -> float:
        """V - 1 of the best selection."""
        return self._added(self.concentration, ratio)

    def _added(self, part: float, ratio: float) -> float:
        share = min(1.0, self.drawn * ratio)
        return max(0.0, part / share - 1.0) if ratio < 1.0 and share > 0.0 else 0.0
