from __future__ import annotations

import pytest
import torch

from cggr_compile.ops.gradient_moments import gradient_moments_reference


def test_sampling_has_no_bias():
    """Sums of w, w g, w g^2 and w^2 g^2 over what is drawn are those of 1, g, g^2 and g^2 / p over all."""
    torch.manual_seed(0)
    g = torch.rand(200_000).pow(3)
    p = (0.1 + 0.8 * torch.rand_like(g)).clamp(max=1.0)
    drawn = torch.rand_like(g) < p
    found = torch.ops.cggr.gradient_moments(g[None], torch.where(drawn, 1 / p, 0.0)[None])
    expected = torch.stack([p.sum(), torch.tensor(float(len(g))), g.sum(), g.square().sum(), (g.square() / p).sum()])
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_counts_nothing(bad):
    found = gradient_moments_reference(torch.tensor([[bad, 0.5, bad]]), torch.tensor([[2.0, 4.0, 0.0]]))
    assert found.tolist() == [1.0, 4.0, 2.0, 1.0, 4.0]
