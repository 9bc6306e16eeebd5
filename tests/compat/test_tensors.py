"""Tensors by the memory behind them."""

from __future__ import annotations

import torch

from cggr_compile import compat


def test_unwrapped():
    seen = []
    x = torch.zeros(2, 3)
    torch.vmap(lambda row: seen.append(compat.storage_id(row) == compat.storage_id(x)) or row)(x)
    assert seen == [True] and compat.unwrapped(x) is x
