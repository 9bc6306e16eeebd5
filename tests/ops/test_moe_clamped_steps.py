"""The steps of ``moe_clamped_mlp``: put together they are it."""

from __future__ import annotations

import pytest
import torch
from ops.test_moe_clamped import ALPHA, LIMIT, check, make_case
from torch.library import opcheck

from cggr_compile.ops.moe_clamped import moe_clamped_mlp, moe_clamped_mlp_backward
from cggr_compile.ops.moe_clamped_steps import (
    moe_bias_gradient,
    moe_biased_product,
    moe_biased_routing_gradient,
    moe_clamped_activation,
    moe_clamped_activation_backward,
)
from cggr_compile.ops.moe_routing import moe_permute
from cggr_compile.ops.moe_steps import moe_combine, moe_product, moe_weight_gradient


def calls_of(case, grad):
    """Every step with its arguments, in order. And (out, gradients)."""
    hidden, gate_up, gate_up_bias, down, down_bias, weights, experts = case
    order, position, offsets = moe_permute(experts, gate_up.shape[0])
    top_k = weights.shape[1]
    permuted = (order, offsets, top_k)
    calls = []

    def call(op, *arguments):
        calls.append((op, tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)))
        return op(*arguments)

    inner = call(moe_biased_product, hidden, gate_up, gate_up_bias, *permuted, True, True)
    activation = call(moe_clamped_activation, inner, offsets, ALPHA, LIMIT)
    products = call(moe_biased_product, activation, down, down_bias, None, offsets, 1, True, True)
    out = moe_combine(products, weights, position, offsets, top_k)
    d_activation = call(moe_biased_product, grad, down, None, *permuted, False, True)
    backward = (d_activation, inner, weights, order, offsets, ALPHA, LIMIT)
    weighted, d_inner, by_row = call(moe_clamped_activation_backward, *backward)
    d_hidden = moe_combine(moe_product(d_inner, gate_up, offsets, False, True), None, position, offsets, top_k)
    d_gate_up = moe_weight_gradient(d_inner, hidden, *permuted, False, True)
    d_down = moe_weight_gradient(weighted, grad, *permuted, True, True)
    d_gate_up_bias = call(moe_bias_gradient, gate_up_bias, d_inner, None, *permuted)
    d_down_bias = call(moe_bias_gradient, down_bias, grad, weights, *permuted)
    d_weights = call(moe_biased_routing_gradient, by_row, grad, down_bias, position, offsets, weights)
    return calls, (out, d_hidden, d_gate_up, d_gate_up_bias, d_down, d_down_bias, d_weights)


@pytest.mark.parametrize("routing", ["random", "one", "null", "gaps"])
def test_together_they_are_moe_clamped_mlp(routing):
    case = make_case(150, 16, 24, 3, 2, routing=routing)
    grad = torch.randn_like(case[0])
    permuted = moe_permute(case[6], 3)
    out, inner = moe_clamped_mlp(*case[:6], *permuted, ALPHA, LIMIT, True)
    wanted = (out, *moe_clamped_mlp_backward(grad, *case[:6], inner, *permuted, ALPHA, LIMIT))
    check(calls_of(case, grad)[1], wanted, 1e-5)


def test_operators():
    case = make_case(9, 16, 24, 3, 2)
    for op, arguments in calls_of(case, torch.randn_like(case[0]))[0]:
        assert set(opcheck(op, arguments).values()) == {"SUCCESS"}, op
