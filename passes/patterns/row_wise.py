"""Calls that work on every position by itself: what they compute of some rows is those rows of what they compute."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

import torch

from cggr_compile.passes.fx import layout_only
from cggr_compile.passes.nodes import argument, fake_value, op_name, shape_of
from cggr_compile.passes.patterns.head import CASTS

if TYPE_CHECKING:
    from torch.fx import Node

_POINTWISE = {
    *CASTS,
    *("add", "sub", "mul", "div", "pow", "neg", "rsqrt", "sqrt", "reciprocal", "tanh", "square", "sigmoid"),
    *("silu", "gelu", "relu", "linear", "layer_norm", "rms_norm", "identity", "clamp", "erf", "exp", "abs"),
}
_REDUCTIONS = {"mean", "sum", "var", "std", "norm"}
# along the last axis: the place of ``dim`` among the arguments, and what it is where it is not given
_ALONG = {"chunk": (2, 0), "split": (2, 0), "softmax": (1, None), "topk": (2, -1), "cumsum": (1, None)}
_EXPERTS = {"moe.default", "moe_clamped.default"}
# other operands than the rows may have several axes: they are weights
WEIGHTED = {"linear", "addmm", "gemm_4bit.default", *_EXPERTS}


def not_row_wise(node: Node, streams: Container[Node]) -> str:
    """Why a call does not work on every row by itself; empty if it does.

    Args:
        node: a call. streams: the operands that have rows; any other is one for all rows.
    """
    name = op_name(node)
    if layout_only(node):
        return ""
    if name in _REDUCTIONS and _along_last_axis(node, argument(node, 1, "dim")):
        return ""
    if name in _ALONG and _along_last_axis(node, argument(node, _ALONG[name][0], "dim", _ALONG[name][1])):
        return ""
    if name == "getitem" and isinstance(fake_value(node.args[0]), (tuple, list)):
        return ""
    if name == "dropout" and (argument(node, 1, "p", 0.5) == 0 or argument(node, 2, "training", True) is False):
        return ""
    if name == "addmm" and node.args[1] not in streams:
        return f"{node}, whose rows are its columns,"
    if name not in _POINTWISE and name not in WEIGHTED:
        return f"operator {name!r} ({node})"
    for other in node.all_input_nodes:
        value = fake_value(other)
        if name in _EXPERTS and other not in streams and not value.is_floating_point():
            return f"{node}, whose experts {other} are of all tokens,"
        if other not in streams and isinstance(value, torch.Tensor) and value.dim() > 1 and name not in WEIGHTED:
            return f"{node}, which reads {other} of shape {list(value.shape)},"
    return ""


def _along_last_axis(node: Node, axes: object) -> bool:
    rank = len(shape_of(node.all_input_nodes[0]))
    listed = list(axes) if isinstance(axes, (list, tuple)) else [axes]
    return all(isinstance(axis, int) and axis % rank == rank - 1 for axis in listed)
