"""What several processes should have computed, from what each of them has selected."""

from __future__ import annotations

import torch
from ddp_cases import WORLD, build
from fsdp_cases import batch
from reference import Run, assert_same, hf_reference


def averaged(found, numbers=(0,), prepare=lambda model: model, make=build) -> dict[str, torch.Tensor]:
    """Of both ranks and all ``numbers``, at what each has picked; gradients of several steps add up."""
    total: dict[str, torch.Tensor] = {}
    for rank in range(WORLD):
        for number, chosen in zip(numbers, found[rank]["picks"], strict=True):
            model = prepare(make())
            for name, grad in hf_reference(model, batch(rank, number), chosen).grads.items():
                total[name] = total.get(name, 0) + grad.float() / WORLD
    return total


def same(got, want):
    assert_same(Run(torch.zeros(()), got), Run(torch.zeros(()), want))


def distance(got, want):
    return (
        sum(float((got[n] - g).square().sum()) for n, g in want.items()) ** 0.5
        / sum(float(g.square().sum()) for g in want.values()) ** 0.5
    )


def as_near_as_bfloat16(found):
    """Computed in bfloat16, reduced in float32: as near as bfloat16 to its own reference, and the picks matter."""
    want = averaged(found, prepare=lambda model: model.bfloat16())
    crossed = [{"picks": found[1 - rank]["picks"]} for rank in range(WORLD)]
    other = averaged(crossed, prepare=lambda model: model.bfloat16())
    for one in found:
        assert distance(one["grads"], want) < 0.02 < 0.2 < distance(one["grads"], other)
