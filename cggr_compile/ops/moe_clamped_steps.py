"""The steps of ``cggr::moe_clamped_mlp`` that ``moe_mlp`` has not, for the lowering that chooses how each is computed.

As in ``moe_steps``, which has the others, rows are in the order of their experts, and with ``library`` a product is
left to ``F.grouped_mm``. ``moe_clamped_mlp_reference`` explains the rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cggr_compile.ops.library import define_opaque
from cggr_compile.ops.moe_clamped import _parts


def _experts_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """int64 [rows]; rows without an expert get the last one."""
    row = torch.arange(rows, device=offsets.device)
    return torch.searchsorted(offsets[1:], row, right=True).clamp(max=offsets.shape[0] - 2)


def _biased_product(
    rows: Tensor,
    matrices: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
    top_k: int,
    transposed: bool,
    library: bool,
) -> Tensor:
    """[pairs, N]: rows times their experts' matrices, [K, N], or [N, K] if ``transposed``, plus ``bias`` [E, N].

    ``rows``: [pairs, K]; with ``order``, [tokens, K], of which pair p takes row ``order[p] // top_k``.
    """
    with torch.cuda.device_of(rows):
        if rows.is_cuda and not library:
            from cggr_compile.kernels.moe_products import multiply_rows

            out = _fake_biased_product(rows, matrices, bias, order, offsets, top_k, transposed)
            kernel = {(True, True): "inner", (True, False): "d_activation", (False, True): "down"}
            name = kernel.get((order is not None, transposed), "d_hidden")
            multiply_rows(name, rows, matrices, out, offsets, queues={}, bias=bias, order=order, top_k=top_k)
            return out
        gathered = rows if order is None else rows[order // top_k]
        product = F.grouped_mm(gathered, matrices.mT if transposed else matrices, offs=offsets[1:])
        return product if bias is None else product.add_(bias[_experts_of_rows(offsets, product.shape[0])])


def _fake_biased_product(
    rows: Tensor,
    matrices: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
    top_k: int,
    transposed: bool,
    library: bool = False,
) -> Tensor:
    pairs = rows.shape[0] if order is None else order.shape[0]
    return rows.new_empty(pairs, matrices.shape[1 if transposed else 2])


def _activation(inner: Tensor, offsets: Tensor, alpha: float, limit: float) -> Tensor:
    """[rows, I], of gate and up in turn, ``inner`` [rows, 2 * I]."""
    if inner.is_cuda:
        from cggr_compile.kernels.moe_clamped import activation

        with torch.cuda.device_of(inner):
            return activation(inner, offsets, alpha, limit)
    gate, sigmoid, up = _parts(inner, alpha, limit)
    return (up * gate * sigmoid).to(inner.dtype)


def _fake_activation(inner: Tensor, offsets: Tensor, alpha: float, limit: float) -> Tensor:
    return inner.new_empty(inner.shape[0], inner.shape[1] // 2)


def _activation_backward(
    grad: Tensor, inner: Tensor, weights: Tensor, order: Tensor, offsets: Tensor, alpha: float, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``grad``: [rows, I], of the activation but for its routing weight.

    Returns:
        the activation times its routing weight [rows, I]; the gradient of ``inner`` [rows, 2 * I]; of each row's
        routing weight the part that is not the bias's, float32 [rows].
    """
    if grad.is_cuda:
        from cggr_compile.kernels.moe_clamped import activation_backward

        with torch.cuda.device_of(grad):
            return activation_backward(grad, inner, weights.contiguous(), order, offsets, alpha, limit)
    upstream, weight = grad.float(), weights.reshape(-1).float()[order.long()][:, None]
    gate, sigmoid, up = _parts(inner, alpha, limit)
    activation = up * gate * sigmoid
    raw = inner.float()
    d_gate = weight * upstream * up * sigmoid * (1 + alpha * gate * (1 - sigmoid)) * (raw[:, ::2] <= limit)
    d_up = weight * upstream * gate * sigmoid * (raw[:, 1::2].abs() <= limit)
    d_inner = torch.stack([d_gate, d_up], -1).flatten(1).to(inner.dtype)
    return (activation * weight).to(inner.dtype), d_inner, (upstream * activation).sum(1)


def _fake_activation_backward(grad: Tensor, inner: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    by_row = grad.new_empty(grad.shape[0], dtype=torch.float32)
    return grad.new_empty(grad.shape), inner.new_empty(inner.shape), by_row


def _bias_gradient(
    bias: Tensor, rows: Tensor, weights: Tensor | None, order: Tensor, offsets: Tensor, top_k: int
) -> Tensor:
    """[E, N]: each expert's sum of ``rows`` [rows, N]; with ``weights``, ``rows`` is [tokens, N], each weighed."""
    if rows.is_cuda:
        from cggr_compile.kernels.moe_clamped import bias_gradient

        with torch.cuda.device_of(rows):
            given = None if weights is None else weights.contiguous()
            return bias_gradient(bias, rows, offsets, order, top_k, given)
    values = rows.float()
    if weights is not None:
        values = values[(order // top_k).long()] * weights.reshape(-1).float()[order.long()][:, None]
    routed = torch.arange(order.shape[0]) < offsets[-1]
    values = torch.where(routed[:, None], values, 0.0)
    total = values.new_zeros(bias.shape).index_add_(0, _experts_of_rows(offsets, order.shape[0]), values)
    return total.to(bias.dtype)


def _fake_bias_gradient(bias: Tensor, *_: object) -> Tensor:
    return bias.new_empty(bias.shape)


def _routing_gradient(
    by_row: Tensor, grad: Tensor, bias: Tensor, position: Tensor, offsets: Tensor, weights: Tensor
) -> Tensor:
    """[tokens, top_k], of what ``moe_clamped_activation_backward`` returned and the second product's ``bias``."""
    from cggr_compile.kernels.routing_gradient import biased_routing_gradient

    return biased_routing_gradient(by_row, grad, bias, position, offsets, weights)


def _fake_routing_gradient(
    by_row: Tensor, grad: Tensor, bias: Tensor, position: Tensor, offsets: Tensor, weights: Tensor
) -> Tensor:
    return weights.new_empty(weights.shape)


moe_biased_product = define_opaque(
    "moe_biased_product(Tensor rows, Tensor matrices, Tensor? bias, Tensor? order, Tensor offsets, int top_k,"
    " bool transposed, bool library) -> Tensor",
    _biased_product,
    _fake_biased_product,
)
moe_clamped_activation = define_opaque(
    "moe_clamped_activation(Tensor inner, Tensor offsets, float alpha, float limit) -> Tensor",
    _activation,
    _fake_activation,
)
moe_clamped_activation_backward = define_opaque(
    "moe_clamped_activation_backward(Tensor grad, Tensor inner, Tensor weights, Tensor order, Tensor offsets,"
    " float alpha, float limit) -> (Tensor, Tensor, Tensor)",
    _activation_backward,
    _fake_activation_backward,
)
moe_bias_gradient = define_opaque(
    "moe_bias_gradient(Tensor bias, Tensor rows, Tensor? weights, Tensor order, Tensor offsets, int top_k) -> Tensor",
    _bias_gradient,
    _fake_bias_gradient,
)
moe_biased_routing_gradient = define_opaque(
    "moe_biased_routing_gradient(Tensor by_row, Tensor grad, Tensor bias, Tensor position, Tensor offsets,"
    " Tensor weights) -> Tensor",
    _routing_gradient,
    _fake_routing_gradient,
)
