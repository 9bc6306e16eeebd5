from __future__ import annotations

import torch

import cggr_compile.ops  # noqa: F401  (registers)

ops = torch.ops.cggr


def test_uniform_is_uniform_reproducible_and_moves():
    like = torch.empty(64, 512)
    draws = ops.uniform(torch.tensor([0, 0]), like)
    assert torch.equal(draws, ops.uniform(torch.tensor([0, 0]), like))
    assert draws.min() >= 0 and draws.max() < 1
    histogram = torch.histc(draws, 16, 0, 1) / draws.numel()
    assert (histogram - 1 / 16).abs().max() < 0.005
    for other in ([0, 1], [1, 0]):
        moved = ops.uniform(torch.tensor(other), like)
        assert torch.corrcoef(torch.stack([draws.flatten(), moved.flatten()]))[0, 1].abs() < 0.02
    assert torch.corrcoef(draws[:2])[0, 1].abs() < 0.15  # sequences draw independently


def test_uniform_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    ops.uniform(torch.tensor([7, 7]), torch.empty(2, 2))
    assert torch.equal(before, torch.get_rng_state())
