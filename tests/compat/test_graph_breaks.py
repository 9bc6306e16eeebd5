"""Graph breaks: their reasons and places."""

from __future__ import annotations

import inspect

import torch

from cggr_compile import compat


def test_names_of_dynamo():
    from torch._dynamo.output_graph import GraphCompileReason
    from torch._dynamo.utils import graph_break_reasons

    assert isinstance(graph_break_reasons, list)
    assert list(inspect.signature(GraphCompileReason).parameters) == ["reason", "user_stack", "graph_break"]


def test_graph_breaks_and_places():
    found = []

    def keep(gm, inputs):
        found.append((compat.break_at_end(), compat.resumed_at(compat.captured_code())))
        return gm.forward

    def step(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    line = step.__code__.co_firstlineno + 2
    torch.compile(step, backend=keep)(torch.ones(2))
    (first, not_resumed), (last, resumed) = found
    assert first is not None and (first.stack[-1].filename, first.stack[-1].lineno) == (__file__, line)
    assert compat.graph_breaks() == [first] and last is None and not_resumed is None and resumed == line


def test_capture_again():
    breaks, ends = [True], []

    def remove(gm, inputs):
        ends.append(compat.break_at_end() is not None)
        if breaks:
            breaks.clear()
            compat.capture_again()
        return gm.forward

    def step(x):
        y = x + 1
        if breaks:
            torch._dynamo.graph_break()
        return y * 2

    run = torch.compile(step, backend=remove)
    assert torch.equal(run(torch.ones(2)), torch.full((2,), 4.0)) and ends == [True, False]
    assert torch.equal(run(torch.zeros(2)), torch.full((2,), 2.0)) and ends == [True, False]  # nothing is left of it


def test_outside_a_capture():
    assert compat.break_at_end() is None and compat.resumed_at(test_outside_a_capture.__code__) is None
