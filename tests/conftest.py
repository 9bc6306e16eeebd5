"""One thread per worker, one seed, a clean Dynamo for every test, and no pass that fails in silence."""

from __future__ import annotations

import gc
import os

import models
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
os.environ["CGGR_STRICT"] = "1"  # a pass that fails must not pass for a graph that does not match


def pytest_collection_finish():
    """Compiling makes many objects: the garbage collector need not look at those of the imports again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


# Of the matrices, the quick tests (-m "not slow") are these.
QUICK_FAMILIES = {"llama", "gpt2", "gemma2", "mixtral"}
QUICK_ARCHITECTURE = 90


def pytest_collection_modifyitems(items):
    slow_families = {*models.FAMILIES, *models.OTHER_FAMILIES} - QUICK_FAMILIES
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        families = {value for value in values.values() if isinstance(value, str)} & slow_families
        if families or values.get("arch", QUICK_ARCHITECTURE) != QUICK_ARCHITECTURE:
            item.add_marker(pytest.mark.slow)
