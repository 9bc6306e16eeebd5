from __future__ import annotations

import pytest
import torch

from cggr_compile.ops.gradient_moments import gradient_moments_reference
from cggr_compile.relative_variance import RelativeVariance, dense_share, normalised

COUNT = 100_000


def of(norms, p, ratio, labelled=1.0):
    """What a draw by the probabilities says; ``labelled``: share of the positions with a label."""
    drawn = torch.rand(len(norms)) < p
    moments = gradient_moments_reference(norms[None], torch.where(drawn, 1 / p, 0.0)[None])
    found = RelativeVariance.of(normalised(moments, ratio * labelled).tolist())
    assert found is not None
    return found


@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_the_variance_of_what_is_drawn(ratio):
    """Against the formulas of the module, for no scores, the best ones, and some between."""
    torch.manual_seed(0)
    g = 0.1 + torch.rand(COUNT)
    c = float(g.mean() ** 2 / g.square().mean())
    scores = {"none": torch.ones(COUNT), "some": 1 + g / g.mean(), "best": g}
    for name, score in scores.items():
        p = ratio * score / score.mean()
        assert p.max() <= 1
        expected = float((g.square() / p).sum() / g.square().sum()) - 1
        found = of(g, p, ratio)
        assert found.concentration == pytest.approx(c, rel=0.02)
        assert found.added(ratio) == pytest.approx(expected, rel=0.03)
        assert found.added(ratio / 2) == pytest.approx(2 * (expected + 1) - 1, rel=0.03)
        assert found.least(ratio) == pytest.approx(c / ratio - 1, rel=0.03)
        assert found.achieved == pytest.approx({"none": 1.0, "best": c}.get(name, found.achieved), rel=0.02)
    assert of(g, torch.full_like(g, ratio), ratio).added(1.0) == 0.0


def test_steps_of_several_ratios_add_up():
    torch.manual_seed(0)
    g = torch.rand(COUNT)
    moments = [
        gradient_moments_reference(g[None, :: round(1 / r)], torch.full((1, round(COUNT * r)), 1 / r))
        for r in (0.5, 0.25)
    ]
    together = RelativeVariance.of(
        sum(normalised(each, r) for each, r in zip(moments, (0.5, 0.25), strict=True)).tolist()
    )
    assert together.added(0.5) == pytest.approx(1.0, rel=0.01) and together.added(0.25) == pytest.approx(3.0, rel=0.01)
    assert together.drawn == pytest.approx(1.0)


def test_few_labels_are_all_drawn():
    """A tenth of the positions have one: half as many slots as positions draw all of them, and add nothing."""
    g = torch.rand(COUNT)
    found = of(g, torch.ones(COUNT), ratio=0.5)
    assert found.added(0.5) == 0.0 and found.drawn == 2.0
    assert of(g, torch.full((COUNT,), 0.5), ratio=0.5, labelled=0.1).added(0.05) == pytest.approx(1.0, rel=0.02)


def test_without_a_gradient_nothing_is_known():
    assert RelativeVariance.of([0.0] * 5) is None
    assert RelativeVariance.of(normalised(torch.zeros(5), 0.25).tolist()) is None


def test_the_dense_share():
    assert dense_share(0.25) == 0.5 and dense_share(1.0) == 1.0
