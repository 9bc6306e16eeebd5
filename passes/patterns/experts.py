"""The experts of Mixture-of-Experts layers as transformers traces them: sort, grouped products, SwiGLU, unsort."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from cggr_compile.ops.library import runs_kernels
from cggr_compile.passes.nodes import argument, fake_value, op_name, same_size, shape_of

GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")


class NotExpertsError(Exception):
    """Why grouped products are not the experts that ``cggr::moe`` computes."""


@dataclass(frozen=True)
class Experts:
    """The arguments of ``cggr::moe``, and what it replaces: everything from ``sort`` to ``total`` [N, H].

    ``matrices``: gate_up and down, with whether they are stored transposed. ``clamped``: biases of both products,
    alpha and limit of ``cggr::moe_clamped``.
    """

    hidden: Node
    matrices: tuple[tuple[Node, bool], tuple[Node, bool]]
    weights: Node
    experts: Node
    sort: Node
    total: Node
    clamped: tuple[Node, Node, float, float] | None


# Arguments of nodes are Any below: each helper says what it expects, and raises where that is not so.


def match_experts(products: list[Any]) -> Experts:
    if len(products) != 2:
        raise NotExpertsError(f"{len(products)} grouped products over the same rows, expected two")
    first, second = products
    matrices = _matrix(first), _matrix(second)
    (experts, width, double), (*others, out) = (shape_of(argument(p, 1, "weight")) for p in products)
    masks = list[Any]()
    if (*others, out) != (experts, double // 2, width) or double % 2:
        raise NotExpertsError(f"weights {[shape_of(m) for m, _ in matrices]} are not those of gated experts")

    # where the rows come from: the sort
    hidden, token = _indexed(_unmasked(argument(first, 0, "input"), masks))
    order, top_k = _arguments(token, "floordiv")
    sort = _item(order, 1, "sort")
    choice, *_ = _arguments(argument(sort, 0, "input"), "reshape", "view")
    tokens, rows = shape_of(hidden)[0], shape_of(order)[0]
    if shape_of(choice) != (tokens, top_k) or argument(sort, 2, "descending", False):
        raise NotExpertsError("rows are not sorted by a choice [tokens, top_k] of experts")
    _check_offsets(argument(first, 2, "offs"), sort, experts)

    # between the products: the activation
    activated = _plain(argument(second, 0, "input"))
    users = [_biased(product, sort, experts) for product in products]
    (first_out, first_bias), (second_out, second_bias) = users
    clamped: tuple[Any, Any, float, float] | None = None
    if first_bias is not None and second_bias is not None:
        inner, alpha, limit = _clamped_swiglu(activated)
        clamped = (first_bias, second_bias, alpha, limit)
    elif first_bias is None and second_bias is None:
        if any(transposed for _, transposed in matrices):
            raise NotExpertsError("weights are not stored as [experts, out, in]")
        gate, up = _swiglu(activated)
        if gate is not up:
            raise NotExpertsError("gate and up are not the halves of one product")
        inner = argument(gate, 0, "input")
    else:
        raise NotExpertsError("one product has a bias, the other has not")
    if _unmasked(inner, masks) is not first_out:
        raise NotExpertsError("the activation is not that of the first product")

    # after the second: routing weights, then every row goes back to its token
    done, weighted = second_out, _only_user(second_out)
    while _is(weighted, "masked_fill"):
        _unmasked(weighted, masks)
        done, weighted = weighted, _only_user(weighted)
    scales = [n for n in weighted.all_input_nodes if n is not done]
    if not _is(weighted, "mul") or len(scales) != 1:
        raise NotExpertsError("something (a bias?) lies between the second product and its routing weights")
    weights = _routing_weights(scales[0], order)
    if shape_of(weights) != (tokens, top_k):
        raise NotExpertsError("not one routing weight per token and choice")
    back = _only_user(weighted)
    source, inverse = _indexed(back)
    if source is not weighted or not _inverts(inverse, order, rows):
        raise NotExpertsError("rows do not go back to where they came from")
    by_token = _only_user(back)
    total = _only_user(by_token)
    shaped = _is(by_token, "view", "reshape") and shape_of(by_token) == (tokens, top_k, width)
    if not shaped or not _is(total, "sum") or shape_of(total) != (tokens, width) or argument(total, 1, "dim") != 1:
        raise NotExpertsError("rows are not summed up token by token")
    for mask in masks:
        _check_mask(mask, sort, experts)
    _check_device(hidden, *(matrix for matrix, _ in matrices))
    return Experts(hidden, matrices, weights, choice, sort, total, clamped)


def _is(node: Any, *names: str) -> bool:
    return isinstance(node, Node) and op_name(node) in names


def _arguments(node: Any, *names: str) -> tuple[Any, ...]:
    if not _is(node, *names):
        raise NotExpertsError(f"{node} is not {' or '.join(names)}")
    return tuple(node.args)


def _plain(node: Any) -> Any:
    """Through casts that change nothing."""
    while _is(node, "to") and fake_value(node).dtype == fake_value(node.args[0]).dtype:
        node = node.args[0]
    return node


def _unmasked(node: Any, masks: list[Any]) -> Any:
    """Through masked_fill(mask, 0) too; what masks ends up in ``masks``."""
    node = _plain(node)
    while _is(node, "masked_fill"):
        if argument(node, 2, "value") != 0:
            raise NotExpertsError(f"{node} fills in something else than zero")
        masks.append(argument(node, 1, "mask"))
        node = _plain(node.args[0])
    return node


def _check_mask(mask: Any, sort: Any, experts: int) -> None:
    """(ids >= E).unsqueeze(-1): rows without an expert, which add nothing anyway."""
    compared, *axis = _arguments(mask, "unsqueeze")
    ids, bound = _arguments(compared, "ge")
    if axis not in ([-1], [1]) or bound != experts or _item(ids, 0, "sort") is not sort:
        raise NotExpertsError(f"{mask} masks more than rows without an expert")


def _matrix(product: Any) -> tuple[Any, bool]:
    """W [E, N, K] of a product with its transpose and False, or W [E, K, N] and True."""
    weight = argument(product, 1, "weight")
    if _is(weight, "transpose") and {argument(weight, i, f"dim{i - 1}") % 3 for i in (1, 2)} == {1, 2}:
        return weight.args[0], False
    return weight, True


def _biased(product: Any, sort: Any, experts: int) -> tuple[Any, Any]:
    """``product + bias[min(ids, E - 1)]`` and bias [E, N], or the product and None."""
    added = next(iter(product.users)) if len(product.users) == 1 else None
    if not isinstance(added, Node) or not _is(added, "add") or added.args[0] is not product:
        return product, None
    bias, ids = _indexed(added.args[1])
    if _is(ids, "clamp") and argument(ids, 1, "min") is None and argument(ids, 2, "max") == experts - 1:
        ids = ids.args[0]
    if added.kwargs or shape_of(bias) != (experts, shape_of(product)[1]) or _item(ids, 0, "sort") is not sort:
        raise NotExpertsError("what is added to a product is not a bias per expert")
    return added, bias


def _indexed(node: Any) -> tuple[Any, Any]:
    """(x, index) of ``x[index]`` with one index tensor."""
    source, index = _arguments(node, "getitem")
    if isinstance(index, tuple) and len(index) == 1:
        (index,) = index
    if not isinstance(fake_value(source), torch.Tensor) or not isinstance(index, Node):
        raise NotExpertsError(f"{node} is not indexed by rows")
    return source, index


def _item(node: Any, index: int, name: str) -> Any:
    """The call ``name`` whose result number ``index`` this is."""
    call, number = _arguments(node, "getitem")
    if not _is(call, name) or number != index:
        raise NotExpertsError(f"{node} is not result {index} of {name}")
    return call


def _swiglu(product: Any) -> tuple[Any, Any]:
    """The calls of ``chunk(2, -1)`` that gate and up of ``silu(gate) * up`` come from."""
    factors = _arguments(product, "mul")
    gates, others = ([n for n in factors if _is(n, "silu") is kind] for kind in (True, False))
    if len(gates) != 1 or len(others) != 1:
        raise NotExpertsError("the activation is not SwiGLU")
    chunks = _item(_plain(argument(gates[0], 0, "input")), 0, "chunk"), _item(others[0], 1, "chunk")
    for chunk in chunks:
        if argument(chunk, 1, "chunks") != 2 or argument(chunk, 2, "dim", 0) not in (-1, 1):
            raise NotExpertsError("gate and up are not halves")
    return chunks


def _clamped_swiglu(product: Any) -> tuple[Any, float, float]:
    """(z, alpha, limit) of ``(up + 1) * (gate * sigmoid(gate * alpha))``: gate ``z[..., ::2].clamp(max=limit)``, up
    ``z[..., 1::2].clamp(-limit, limit)``."""
    above, glu = _arguments(product, "mul")
    up, one = _arguments(above, "add")
    gate, sigmoid = _arguments(glu, "mul")
    factor, alpha = _arguments(_arguments(sigmoid, "sigmoid")[0], "mul")
    parts = [_arguments(_arguments(half, "clamp")[0], "getitem") for half in (gate, up)]
    limit = argument(gate, 2, "max")
    bounds = argument(gate, 1, "min"), argument(up, 1, "min"), argument(up, 2, "max")
    columns = [(..., slice(start, None, 2)) for start in (None, 1)]
    numbers = isinstance(limit, (int, float)) and isinstance(alpha, (int, float))
    if not numbers or one != 1 or above.kwargs or factor is not gate or bounds != (None, -limit, limit):
        raise NotExpertsError("the activation is not the clamped SwiGLU of gpt-oss")
    if [index for _, index in parts] != columns or parts[0][0] is not parts[1][0]:
        raise NotExpertsError("gate and up do not alternate")
    return parts[0][0], float(alpha), float(limit)


def _check_offsets(offsets: Any, sort: Any, experts: int) -> None:
    """cumsum(histc(ids.float(), bins=E, min=0, max=E - 1))"""
    _arguments(offsets, "cumsum")
    counts = argument(offsets, 0, "input")
    _arguments(counts, "histc")
    bounds = tuple(argument(counts, i + 1, name) for i, name in enumerate(("bins", "min", "max")))
    ids = argument(counts, 0, "input")
    ids = ids.args[0] if _is(ids, "float", "int", "to") else ids
    if bounds != (experts, 0, experts - 1) or _item(ids, 0, "sort") is not sort:
        raise NotExpertsError("offsets are not counts of the sorted choice")


def _routing_weights(scale: Any, order: Any) -> Any:
    """weights [N, k] of ``weights.reshape(-1)[order].unsqueeze(-1)``."""
    rows, *axis = _arguments(scale, "unsqueeze")
    flat, index = _indexed(_plain(rows))
    if index is not order or axis not in ([-1], [1]):
        raise NotExpertsError("routing weights are not sorted like the rows")
    return _arguments(flat, "reshape", "view")[0]


def _inverts(inverse: Any, order: Any, rows: Any) -> bool:
    """``inverse = empty_like(order); inverse[order] = arange(rows)``"""
    writes = [n for n in inverse.users if n.target is operator.setitem]
    if not _is(inverse, "empty_like") or inverse.args[0] is not order or len(writes) != 1:
        return False
    _, index, values = writes[0].args
    return index is order and _is(values, "arange") and len(values.args) == 1 and same_size(shape_of(values)[0], rows)


def _only_user(node: Any) -> Any:
    if len(node.users) != 1:
        raise NotExpertsError(f"{node} is used elsewhere")
    return next(iter(node.users))


def _check_device(hidden: Any, *matrices: Any) -> None:
    value = fake_value(hidden)
    if any(fake_value(n).dtype != value.dtype for n in matrices):
        raise NotExpertsError("tokens and weights have different dtypes")
    if value.device.type != "cpu" and not (value.device.type == "cuda" and runs_kernels(value)):
        raise NotExpertsError(f"no kernel for {value.dtype} on {value.device.type}")
