"""Inductor's CUDA graphs, without a device."""

from __future__ import annotations

import pytest
import torch

from cggr_compile.backend import cggr


@pytest.mark.slow
def test_dynamo_reset_drops_cuda_graphs(monkeypatch):
    from torch._inductor import cudagraph_trees

    dropped = []
    monkeypatch.setattr(cudagraph_trees, "reset_cudagraph_trees", lambda: dropped.append(1))
    torch.compile(lambda x: x + 1, backend=cggr)(torch.ones(1))
    torch._dynamo.reset()
    assert dropped
