"""Symbolic sizes: their symbols, values and guards."""

from __future__ import annotations

import torch

from cggr_compile import compat


def test_sizes_of_a_capture():
    seen = []

    def backend(gm, inputs):
        values = (node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder"))
        (size,) = (value.shape[0] for value in values if isinstance(value, torch.Tensor))
        seen.append((len(compat.symbols(size)), compat.hint(size), compat.depends_on_data(size)))
        if len(seen) > 1:
            compat.pin_size(size)
        return gm.forward

    run = torch.compile(lambda x: x * 2, backend=backend, dynamic=True)
    run(torch.ones(5)), run(torch.ones(6))
    assert seen == [(1, 5, False)]  # no guard on the size: one graph
    torch._dynamo.reset()
    run(torch.ones(5)), run(torch.ones(6))
    assert seen[1:] == [(1, 5, False), (1, 6, False)]


def test_numbers():
    assert compat.symbols(5) == set() and compat.hint(5) == 5 and not compat.depends_on_data(5)


def test_marked_tensors():
    x = torch.ones(3, 2)
    assert not compat.marked_dynamic(x)
    torch._dynamo.mark_dynamic(x, 0)
    assert compat.marked_dynamic(x)
