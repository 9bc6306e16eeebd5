"""Fake tensors with numbers for sizes."""

from __future__ import annotations

import torch

from cggr_compile import compat


def test_static_fake_tensors():
    mode, real = compat.static_fake_mode(), torch.zeros(3, 7)
    assert [type(size) for size in mode.from_tensor(real).shape] == [int, int]
    assert compat.is_fake(mode.from_tensor(real)) and not compat.is_fake(real)
