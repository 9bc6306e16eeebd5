"""How a call multiplies its operands, and which of them have the positions: one reader for each operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from cggr_compile.passes.analysis.uses import Use
from cggr_compile.passes.nodes import argument, fake_value, op_name, same_size, shape_of


@dataclass(frozen=True)
class Product:
    """A call that multiplies ``factors``, each with its axis of the positions (None: it has none), and adds others."""

    factors: tuple[tuple[Node, int | None], ...]
    added: tuple[Node, ...] = ()


def product_of(node: Node, use: Use) -> Product | None:
    """How a call multiplies, if it does, for positions on axis ``use.axis`` of its result."""
    read = PRODUCTS.get(op_name(node)) if use.kind == "rows" else None
    return read(node, use.axis) if read is not None else None


def tensors(values: Iterable[Any]) -> list[Node]:
    return [n for n in values if isinstance(n, Node) and isinstance(fake_value(n), torch.Tensor)]


def _broadcast(node: Node, operand: Node, axis: int) -> int | None:
    """The axis of an operand that is spread to ``axis`` of the result."""
    own = axis - (len(shape_of(node)) - len(shape_of(operand)))
    return own if own >= 0 and same_size(shape_of(operand)[own], shape_of(node)[axis]) else None


def _elementwise(node: Node, axis: int, factors: Iterable[Any], added: Iterable[Any] = ()) -> Product:
    return Product(tuple((n, _broadcast(node, n, axis)) for n in tensors(factors)), tuple(tensors(added)))


def _linear(node: Node, axis: int) -> Product | None:
    x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    rows = axis < len(shape_of(node)) - 1
    return Product(((x, axis), (weight, None)), tuple(tensors([bias]))) if rows else None


def _bilinear(node: Node, axis: int) -> Product | None:
    x, y, weight, bias = (argument(node, i, name) for i, name in enumerate(("input1", "input2", "weight", "bias")))
    rows = axis < len(shape_of(node)) - 1
    return Product(((x, axis), (y, axis), (weight, None)), tuple(tensors([bias]))) if rows else None


def _normed(node: Node, axis: int) -> Product | None:
    """``layer_norm`` and ``rms_norm``."""
    x, axes, weight, bias = (
        argument(node, i, name) for i, name in enumerate(("input", "normalized_shape", "weight", "bias"))
    )
    rows = isinstance(axes, (tuple, list, torch.Size)) and axis < len(shape_of(node)) - len(axes)
    weights = tuple((w, None) for w in tensors([weight]))
    return Product(((x, axis), *weights), tuple(tensors([bias]))) if rows else None


def _matmul(node: Node, axis: int, first: int = 0) -> Product | None:
    """``x @ y``, the operands from ``first`` on; what stands before them is added."""
    operands = tensors([*node.args, *node.kwargs.values()])
    x, y = operands[first : first + 2]
    rank, ranks = len(shape_of(node)), (len(shape_of(x)), len(shape_of(y)))
    if min(ranks) < 2:
        return None
    axes = (_broadcast(node, x, axis), _broadcast(node, y, axis))
    if axis >= rank - 2:
        axes = (ranks[0] - 2, None) if axis == rank - 2 else (None, ranks[1] - 1)
    return Product(((x, axes[0]), (y, axes[1])), tuple(operands[:first]))


def _tensordot(node: Node, axis: int) -> Product | None:
    x, y = tensors(node.args[:2])
    dims = argument(node, 2, "dims", 2)
    if not isinstance(dims, int):
        return None
    own = len(shape_of(x)) - dims
    return Product(((x, axis), (y, None))) if axis < own else Product(((x, None), (y, axis - own + dims)))


def _einsum(node: Node, axis: int) -> Product | None:
    text = node.args[0]
    given: Any = node.args[1:]
    operands = tensors(given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given)
    if not isinstance(text, str) or "." in text or "->" not in text:
        return None
    terms, result = text.replace(" ", "").split("->")
    names, letter = terms.split(","), result[axis]
    if len(names) != len(operands) or any(name.count(letter) > 1 for name in names):
        return None
    pairs = zip(operands, names, strict=True)
    return Product(tuple((n, name.index(letter) if letter in name else None) for n, name in pairs))


def _added_product(node: Node, axis: int) -> Product:
    """``addcmul``, and ``lerp``, which is one but for the first operand's share."""
    x, *factors = tensors([*node.args, *node.kwargs.values()])
    return _elementwise(node, axis, factors, [x])


_BOTH = ("mul", "and", "bitwise_and", "logical_and")
ELEMENTWISE = (*_BOTH, "div", "addcmul", "lerp")
PRODUCTS: dict[str, Callable[[Node, int], Product | None]] = {
    **dict.fromkeys((*_BOTH, "div"), lambda node, axis: _elementwise(node, axis, node.all_input_nodes)),
    **dict.fromkeys(("addcmul", "lerp"), _added_product),
    "linear": _linear,
    "bilinear": _bilinear,
    **dict.fromkeys(("matmul", "bmm"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), lambda node, axis: _matmul(node, axis, 1)),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normed),
    "tensordot": _tensordot,
    "einsum": _einsum,
}
# without a rule for the rows; what follows their first operand are weights
WEIGHED = {
    *("linear", "matmul", "bmm", "einsum", "addmm", "conv1d", "conv2d", "conv3d", "bilinear", "prelu"),
    *("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "weight_norm"),
}
