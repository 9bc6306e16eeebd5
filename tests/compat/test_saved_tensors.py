"""Saved-tensors hooks, read and held off."""

from __future__ import annotations

import torch

from cggr_compile import compat


def test_saved_tensors_hooks():
    names = []

    def hooks(name):
        return torch.autograd.graph.saved_tensors_hooks(lambda x: names.append(name) or x, lambda x: x)

    x = torch.ones(2, requires_grad=True)
    assert not compat.under_saved_tensors_hooks() and compat.saved_tensors_packers() == []
    with hooks("outer"), hooks("inner"):
        assert compat.under_saved_tensors_hooks()
        for pack in compat.saved_tensors_packers():
            pack(x)
        assert names == ["inner", "outer"]
        with compat.no_saved_tensors_hooks():
            x.sin().sum()
        assert names == ["inner", "outer"]
        x.sin().sum()  # those in force are what they were
        assert names == ["inner", "outer", "inner"]
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert compat.saved_tensors_packers() == [] and not compat.under_saved_tensors_hooks()
