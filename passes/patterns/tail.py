"""The position-wise tail between the last block and the head: checked once, copied onto other rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from cggr_compile.passes.analysis.modes import cast_as, modes_of
from cggr_compile.passes.facts import LayerStack, LossSite
from cggr_compile.passes.fx import Emitter, layout_only
from cggr_compile.passes.nodes import argument, fake_value, op_name, shape_of
from cggr_compile.passes.patterns.head import CASTS, token_slice

if TYPE_CHECKING:
    from torch.fx import Node

_POINTWISE = {
    *CASTS,
    *("add", "sub", "mul", "div", "pow", "neg", "rsqrt", "sqrt", "reciprocal", "tanh", "square", "sigmoid"),
    *("silu", "gelu", "relu", "linear", "layer_norm", "rms_norm", "identity", "clamp"),
}
_LAST_AXIS = {"mean", "sum", "var", "std", "norm"}


def tail_start(tail: tuple[Node, ...], last: Node) -> int | str:
    """First position the tail keeps; or, as a string, why it does not work position by position."""
    inside = {last, *tail}
    start = 0
    for node in tail:
        name = op_name(node)
        if name == "getitem" and (begin := token_slice(node)) is not None:
            start += begin
            continue
        if layout_only(node):
            continue
        if name in _LAST_AXIS and _reduces_last_axis(node):
            continue
        if name == "dropout" and (argument(node, 1, "p", 0.5) == 0 or argument(node, 2, "training", True) is False):
            continue
        if name not in _POINTWISE:
            return f"operator {name!r} ({node}) between the last block and the head"
        for other in node.all_input_nodes:
            value = fake_value(other)
            if other not in inside and isinstance(value, torch.Tensor) and value.dim() > 1 and name != "linear":
                return f"{node} between the last block and the head reads {other} of shape {list(value.shape)}"
    return start


def _reduces_last_axis(node: Node) -> bool:
    rank = len(shape_of(node.all_input_nodes[0]))
    axes = argument(node, 1, "dim")
    axes = list(axes) if isinstance(axes, (list, tuple)) else [axes]
    return all(isinstance(axis, int) and axis % rank == rank - 1 for axis in axes)


def copy_tail(
    emit: Emitter,
    stack: LayerStack,
    loss: LossSite,
    source: Node,
    in_place: bool,
    replaced: Mapping[Node, Node] | None = None,
) -> dict[Node, Node]:
    """Apply the tail to ``source`` [B, *, H] instead of the last block's output.

    Args:
        in_place: put each copy beside its original, in whose modes it then runs; or all of them where the emitter
            stands, under the autocast of the originals.
        replaced: what stands for other inputs of the tail.

    Returns:
        Where each original's value now comes from; the head's input is among the keys.
    """
    mapping = {**(replaced or {}), stack.blocks[-1].output: source}
    modes = modes_of(emit.graph)
    for node in stack.tail:
        inputs = [n for n in node.all_input_nodes if n in mapping]
        if op_name(node) == "getitem" or layout_only(node):
            mapping[node] = mapping[inputs[0]]  # all rows stay; leading axes do not matter
            if in_place and fake_value(inputs[0]).requires_grad and not fake_value(node).requires_grad:
                with emit.before(node, "rewrite_loss"):  # under no_grad
                    mapping[node] = emit.method("detach", mapping[node])
        elif in_place:
            with emit.before(node, "rewrite_loss"):
                mapping[node] = emit.copy(node, mapping)
        else:
            with emit.under(cast_as(emit.modes, modes[node])):
                mapping[node] = emit.copy(node, mapping)
    return mapping
