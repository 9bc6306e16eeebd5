"""``cggr::uniform``: random numbers that are a function of seed and step, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.library import define_composite

_MASK = 0xFFFFFFFF
# Odd 31-bit multiplier of the "lowbias32" integer hash family; the product of two 32-bit numbers with it
# stays below 2**63, so that int64 arithmetic is exact on every device.
_MULTIPLIER = 0x7FEB352D
_SEED_STRIDE = 0x6C078965  # seeds next to each other share no steps


def _mix(x: Tensor) -> Tensor:
    for shift in (16, 15, 16):
        x = x ^ (x >> shift)
        x = (x * _MULTIPLIER) & _MASK
    return x ^ (x >> 16)


def uniform_reference(state: Tensor, like: Tensor) -> Tensor:
    """Pseudo-random float32 in [0, 1) of the shape of ``like`` [B, S], multiples of 2**-24; a function of ``state``.

    Args:
        state: int64 [2], (seed, step). The global generators are neither read nor advanced, and every device
            gives the same numbers.
    """
    # two rounds of mixing in all: a compiler that inlines them repeats each step twice as often as the one after it
    key = _mix((state[0] * _SEED_STRIDE + state[1]) & _MASK)
    batch = torch.arange(like.shape[0], device=like.device)[:, None]
    position = torch.arange(like.shape[1], device=like.device)[None, :]
    bits = _mix((key + batch * like.shape[1] + position) & _MASK)
    return (bits >> 8).to(torch.float32) * (1.0 / (1 << 24))


uniform = define_composite("uniform(Tensor state, Tensor like) -> Tensor", uniform_reference)
