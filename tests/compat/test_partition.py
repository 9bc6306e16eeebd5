"""The cut of the joint graph: the same as PyTorch's own, sooner."""

from __future__ import annotations

import inspect
import math
import random

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networkx.algorithms.flow import boykov_kolmogorov, preflow_push

from cggr_compile import compat
from cggr_compile.compat.partition import quick_minimum_cuts


def test_names_of_aotautograd():
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import default_partition

    assert callable(aot_autograd) and "num_fwd_outputs" in inspect.signature(default_partition).parameters


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_quick_minimum_cuts_are_the_same_cuts(seed):
    draw = random.Random(seed)
    graph = networkx.DiGraph()
    graph.add_edge("source", 0, capacity=math.inf)
    for node in range(25):
        for other in draw.sample(range(node + 1, 27), min(3, 26 - node)):
            graph.add_edge(node, "sink" if other == 26 else other, capacity=draw.choice([0, 1, 1, 2, 5]))
    graph.add_edge(25, "sink", capacity=1)
    usual = networkx.minimum_cut
    value, parts = usual(graph, "source", "sink")
    with quick_minimum_cuts():
        assert networkx.minimum_cut is not usual
        assert networkx.minimum_cut(graph, "source", "sink") == (value, parts)
        assert networkx.minimum_cut(graph, "source", "sink", flow_func=preflow_push) == (value, parts)
    assert networkx.minimum_cut is usual


@pytest.mark.slow
def test_the_partitioner_takes_quick_minimum_cuts(monkeypatch):
    calls = []
    monkeypatch.setattr(
        networkx.algorithms.flow, "boykov_kolmogorov", lambda *a, **k: calls.append(a) or boykov_kolmogorov(*a, **k)
    )
    x = torch.randn(4, 4, requires_grad=True)
    run = torch.compile(
        lambda x: (x.sin() @ x.cos()).sum(), backend=lambda gm, inputs: compat.compile_fx(gm, inputs, {})
    )
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        run(x)
    assert len(calls) == 1
