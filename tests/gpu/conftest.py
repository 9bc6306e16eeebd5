"""Everything here needs a CUDA device and is skipped without one."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def launches_do_not_count(monkeypatch):
    """Without graphs a model of this size would train on every token; a mode leaves no place for the option."""
    monkeypatch.setattr("cggr_compile.passes.semantic.launch_bound.LAUNCH_MS", 0.0)
    monkeypatch.setattr("cggr_compile.passes.semantic.launch_bound.LAUNCH_MS_PER_LAYER", 0.0)
