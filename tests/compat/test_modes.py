"""Calls of a graph that change grad mode, autocast, inference mode and levels of vmap."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch._dynamo.testing import EagerAndRecordGraphs

from cggr_compile import compat


def test_calls_that_change_modes():
    """Dynamo's names for them, with the arguments that are read off a graph, or emitted."""
    parameters = [list(inspect.signature(f).parameters) for f in (compat.ENTER_AUTOCAST, compat.EXIT_AUTOCAST)]
    assert parameters == [["vals"], ["mode"]]
    assert list(inspect.signature(torch.autocast).parameters)[:4] == [
        *("device_type", "dtype", "enabled", "cache_enabled")
    ]
    assert list(inspect.signature(compat.ENTER_INFERENCE).parameters) == ["mode"]
    assert list(inspect.signature(compat.EXIT_INFERENCE).parameters) == ["mode"]
    captured = EagerAndRecordGraphs()

    def program(x):
        with torch.no_grad(), torch.autocast("cpu"), torch.inference_mode():
            return x + 1

    torch.compile(program, backend=captured)(torch.zeros(2))
    known = {*(compat.SET_GRAD, compat.ENTER_AUTOCAST, compat.EXIT_AUTOCAST), compat.ENTER_INFERENCE}
    assert known | {compat.EXIT_INFERENCE} <= {node.target for node in captured.graphs[0].graph.nodes}


def test_modes_are_kept():
    with pytest.raises(ValueError), compat.modes_kept():
        compat.ENTER_AUTOCAST("cpu", torch.bfloat16, True, None)
        compat.SET_GRAD(False)
        raise ValueError
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_levels_of_vmap_are_left_after_an_exception():
    captured = EagerAndRecordGraphs()
    torch.compile(torch.vmap(lambda x: x + 1), backend=captured)(torch.zeros(2))
    calls = [node for node in captured.graphs[0].graph.nodes if compat.enters_or_leaves_vmap(node)]
    entering = next(node for node in calls if "increment" in node.name)
    with pytest.raises(ValueError), compat.modes_kept():
        assert entering.target(*entering.args) == 1
        raise ValueError
    with compat.modes_kept():
        assert entering.target(*entering.args) == 1
