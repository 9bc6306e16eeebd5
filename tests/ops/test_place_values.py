from __future__ import annotations

import pytest
import torch

from cggr_compile.ops.place_values import place_values


def inputs(features: tuple[int, ...] = (), dtype: torch.dtype = torch.float64):
    exact = torch.randn(8, *features, dtype=dtype)
    values = torch.randn(2, 3, *features, dtype=dtype, requires_grad=True)
    index = torch.tensor([[0, 2, 3], [5, 7, 7]])
    factors = torch.tensor([[1.0, 4.0, 0.0], [2.0, 0.5, 0.0]])
    return exact, values, index, factors


@pytest.mark.parametrize("features", [(), (1,), (2, 3)])
def test_exact_forward_and_weighted_gradient(features):
    exact, values, index, factors = inputs(features)
    placed = place_values(exact, values, index, factors)
    assert torch.equal(placed, exact) and placed.data_ptr() != exact.data_ptr()
    grad = torch.randn_like(placed)
    (found,) = torch.autograd.grad(placed, values, grad)
    wanted = grad[index] * factors.view(2, 3, *[1] * len(features))
    torch.testing.assert_close(found, wanted)


def test_a_slot_without_a_value_passes_nothing_on():
    exact, values, index, factors = inputs()
    grad = torch.full((8,), 1.0, dtype=torch.float64)
    grad[[3, 7]] = torch.nan  # of slots that are not used, and of one that is
    (found,) = torch.autograd.grad(place_values(exact, values, index, factors), values, grad)
    assert found[0, 2] == 0 and found[1, 2] == 0 and found[1, 1].isnan()


def test_opcheck():
    torch.library.opcheck(place_values, inputs((2,), torch.float32))
