"""Launches of Triton kernels from a lowering."""

from __future__ import annotations

import weakref

import pytest
import torch

from cggr_compile.compat import launches


def test_a_kernel_is_analysed_once_per_graph(monkeypatch):
    """For equal arguments; of tensors their data types count."""
    from torch._inductor.virtualized import V

    class Graph:
        """A GraphLowering's stand-in."""

    module = pytest.importorskip("torch._higher_order_ops.triton_kernel_wrap")
    names = [n for n in ("identify_accessed_tensors", "identify_mutated_tensors") if hasattr(module, n)]
    assert names, "Inductor analyses kernels under another name"
    calls = []

    def analyse(kernel, arguments, descriptors):
        calls.append(dict(arguments))
        return len(calls)

    monkeypatch.setattr(module, names[0], analyse)
    wide, narrow = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float16)
    results = []
    for graph in (Graph(), Graph()):
        for tensor, size in ((wide, 4), (torch.ones(9, dtype=torch.float64), 4), (narrow, 4), (wide, 5)):
            with V.set_graph_handler(graph), launches._analysed_once():
                results.append(getattr(module, names[0])("kernel", {"x": tensor, "size": size}, {}))
    assert results == [1, 1, 2, 3, 4, 4, 5, 6] and getattr(module, names[0]) is analyse
    weakref.ref(torch._inductor.graph.GraphLowering.__new__(torch._inductor.graph.GraphLowering))
