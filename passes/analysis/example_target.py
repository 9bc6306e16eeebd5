"""The targets of the batch that a graph was captured with, computed without the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cggr_compile.passes.base import GraphContext
from cggr_compile.passes.facts import LossSite
from cggr_compile.passes.nodes import differentiable, fake_value
from cggr_compile.passes.patterns.mask_program import MaskProgram, Undecided

if TYPE_CHECKING:
    from torch.fx import GraphModule


def example_target(gm: GraphModule, ctx: GraphContext) -> Tensor | None:
    """What the cross-entropy takes as its target for ``ctx.example_inputs``, on the CPU; it waits for the device.

    None where the loss has none, where that cannot be told without running the model or drawing random numbers, or
    where the inputs have no values.
    """
    target = ctx[LossSite].target
    if target is None:
        return None
    try:
        program = MaskProgram.of(target, [ctx[LossSite].loss])
        inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), ctx.example_inputs, strict=True))
        feeds = {node: inputs[node] for node in program.inputs if node in inputs}
        if any(map(differentiable, program.nodes)) or not all(map(_is_data, feeds.values())):
            return None
        sizes = {
            symbol: number
            for node, value in inputs.items()
            for size, number in zip(*_sizes(fake_value(node), value), strict=True)
            if isinstance(size, torch.SymInt) and (symbol := size.node.expr).is_Symbol
        }
        return program.run(sizes, {node: feed.detach().cpu() for node, feed in feeds.items()})
    except Undecided:
        return None


def _is_data(value: Any) -> bool:
    return type(value) is Tensor and not value.is_meta


def _sizes(fake: Any, value: Any) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    return ((*fake.shape,), (*value.shape,)) if isinstance(fake, Tensor) else ((fake,), (value,))
