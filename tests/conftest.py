"""One thread per worker, one seed, a clean Dynamo for every test, and no pass that fails in silence."""

from __future__ import annotations

import gc
import logging
import math
import os
import zlib
from collections import defaultdict
from pathlib import Path

import models
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
TESTS = Path(__file__).parent
os.environ["CGGR_STRICT"] = "1"  # a pass that fails must not pass for a graph that does not match


def pytest_collection_finish():
    """Compiling makes many objects: the garbage collector need not look at those of the imports again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    torch._dynamo.config.run_gc_after_compile = False
    # pytest listens to every logger that keeps its records to itself, and to a listener PyTorch prints every graph
    logging.getLogger("torch.__trace").propagate = True


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
# Variants of a test repeat each other here, each with a compilation: of those that are quick otherwise, a quarter is.
COMPILING = (
    *("passes/semantic/", "passes/joint/row_sparse/", "passes/patterns/", "semantics/", "modules/", "benchmarks/"),
    *("test_families.py", "test_captured_reference.py", "test_verify.py", "test_variance.py", "test_pipeline.py"),
    *("test_runtime_resolver.py", "test_runtime.py", "test_explain.py", "test_causes.py", "test_variant_dispatcher.py"),
    *("lowerings/", "ops/", "integrations/"),
)


def pytest_collection_modifyitems(items):
    slow_families = {*models.FAMILIES, *models.OTHER_FAMILIES} - QUICK_FAMILIES
    variants = defaultdict(list)
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        families = {value for value in values.values() if isinstance(value, str)} & slow_families
        if families or values.get("arch", QUICK_ARCHITECTURE) != QUICK_ARCHITECTURE:
            item.add_marker(pytest.mark.slow)
        elif values and item.get_closest_marker("slow") is None:
            variants[item.path, item.originalname].append(item)
    for (path, _), alike in variants.items():
        if not path.relative_to(TESTS).as_posix().startswith(COMPILING):
            continue
        # by their names' checksum: over the tests each value of a common parameter comes up
        alike.sort(key=lambda item: zlib.crc32(item.name.encode()))
        for item in alike[math.ceil(len(alike) / 4) :]:
            item.add_marker(pytest.mark.slow)
