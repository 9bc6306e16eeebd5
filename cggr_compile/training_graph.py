"""Tells a training step's graph from others, while Dynamo captures it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Parameter

from cggr_compile import compat
from cggr_compile.causes import Cause
from cggr_compile.data_parallel import ask_for_the_whole_graph
from cggr_compile.passes.nodes import fake_value


def is_training(gm: GraphModule, inputs: Sequence[Any]) -> tuple[bool, tuple[Cause, str] | None]:
    """Whether the graph is a training step's, and why it cannot be rewritten where that is known beforehand.

    A graph that answers by the mode of a module (train or eval) guards that mode.
    """
    trained = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    if not torch.is_grad_enabled() or not any(t.dim() or isinstance(t, Parameter) for t in trained):
        return False, None  # what requires grad is a number and no parameter: a loss that another graph has computed
    results = (fake_value(node) for node in gm.graph.output_node().all_input_nodes)
    if not any(isinstance(t, Tensor) and t.requires_grad for t in results):
        return False, None  # an optimizer's update, say
    scopes = compat.frame_scopes()
    paths = {path for node in gm.graph.nodes for path, _ in node.meta.get("nn_module_stack", {}).values()}
    modules = [m for path in paths if (m := compat.module_at(path, scopes)) is not None]
    if paths and not modules:
        return True, (Cause.UNKNOWN_MODE, Cause.UNKNOWN_MODE.says(module=min(paths)))
    # a frozen part may be in evaluation mode; a functional model has no mode at all
    training = not modules or any(m.training for m in modules)
    for path in _deciding(paths, scopes):
        compat.guard_mode(path)
    return training, ask_for_the_whole_graph() if training else None


def _deciding(paths: set[str], scopes: dict[str, dict[str, Any]]) -> set[str]:
    """The modules whose mode tells a training step: the outermost ones, and one inside that trains where none does."""
    found = {outer for path in paths if (outer := compat.outermost_module(path, scopes)) is not None}
    if any(compat.module_at(path, scopes).training for path in found):  # type: ignore[union-attr]
        return found
    inner = (path for path in sorted(paths) if (m := compat.module_at(path, scopes)) is not None and m.training)
    return found | set(itertools.islice(inner, 1))
