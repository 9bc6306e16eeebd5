"""A model's cost, and what FlopCounterMode counts of the same graphs when they run."""

from __future__ import annotations

from typing import Any

import models
import torch
from torch import nn
from torch.fx import GraphModule, Interpreter
from torch.utils.flop_counter import FlopCounterMode

from cggr_compile.cost.flops import attention, attention_backward
from cggr_compile.cost.graphs import Captured, capture
from cggr_compile.cost.propagate import ATTENTION, ATTENTION_BACKWARD
from cggr_compile.cost.step import Cost
from cggr_compile.options import Options

# PyTorch's table has the attention of other devices only
ON_CPU = {
    ATTENTION[0]: lambda q, k, v, *_, out_shape=None, **__: attention(q, k, v),
    ATTENTION_BACKWARD[0]: lambda grad, q, k, v, *_, out_shape=None, **__: attention_backward(q, k, v),
}


def captured(model: nn.Module, batch: dict[str, Any], **options: Any) -> Captured:
    torch._dynamo.reset()
    (found,) = capture(model, (), batch, Options.parse(options))
    return found


def executed(graphs: Captured) -> dict[str, list[int]]:
    """The FLOPs of forward and backward that FlopCounterMode sees: "dense" and "selective"."""
    halves = {"dense": graphs.dense, "selective": graphs.selective}
    return {name: [_flops(one.forward), _flops(one.backward)] for name, one in halves.items() if one is not None}


def _flops(graph: GraphModule) -> int:
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    fake = next(value.fake_mode for value in inputs if hasattr(value, "fake_mode"))
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter, fake:
        Interpreter(graph).run(*inputs)
    return counter.get_total_flops()


def predicted(cost: Cost, other: Cost) -> dict[str, list[float]]:
    """FLOPs by the expressions of ``cost`` at the sizes of ``other``, which has the same symbols."""
    sizes = {name: float(value) for name, value in other.values.items()}
    steps = {"dense": cost.dense, "selective": cost.selective}
    return {
        name: [cost.at(half.flops, **sizes) for half in (step.forward, step.backward)]
        for name, step in steps.items()
        if step is not None
    }


def batch_of(size: int, seq: int, labelled: int | None = None) -> dict[str, Any]:
    batch = {name: value % 64 for name, value in models.make_batch(size, seq, ignored=False).items()}
    if labelled is not None:
        batch["labels"][:, :-labelled] = models.IGNORE
    return batch
