"""The steps of ``moe_mlp``: put together they are it."""

from __future__ import annotations

import pytest
import torch
from ops.test_moe import check, make_case
from torch.library import opcheck

from cggr_compile.ops.moe import moe_mlp, moe_mlp_backward
from cggr_compile.ops.moe_routing import moe_permute
from cggr_compile.ops.moe_steps import (
    moe_combine,
    moe_product,
    moe_routing_gradient,
    moe_schedule,
    moe_swiglu,
    moe_swiglu_backward,
    moe_weight_gradient,
)


def calls_of(case, grad):
    """Every step with its arguments, in order; those that are written hold NaN. And (out, gradients)."""
    hidden, gate_up, down, weights, experts = case
    order, position, offsets = moe_permute(experts, gate_up.shape[0])
    rows, top_k = order.shape[0], weights.shape[1]
    calls = []

    def call(op, *arguments):
        calls.append((op, tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)))
        return op(*arguments)

    inner, d_inner = (hidden.new_full((rows, gate_up.shape[1]), torch.nan) for _ in range(2))
    weighted = hidden.new_full((rows, down.shape[2]), torch.nan)
    call(moe_schedule, offsets, rows)
    activation = call(moe_swiglu, hidden, gate_up, order, offsets, inner, top_k, True)
    routed = int(offsets[-1])
    assert torch.equal(activation[:routed], moe_swiglu(hidden, gate_up, order, offsets, None, top_k, True)[:routed])
    products = call(moe_product, activation, down, offsets, True, True)
    out = call(moe_combine, products, weights, position, offsets, top_k)
    parts = call(moe_swiglu_backward, grad, down, order, offsets, inner, weights, d_inner, weighted, top_k, True)
    d_rows = call(moe_product, d_inner, gate_up, offsets, False, True)
    d_hidden = call(moe_combine, d_rows, None, position, offsets, top_k)
    d_gate_up = call(moe_weight_gradient, d_inner, hidden, order, offsets, top_k, False, True)
    d_down = call(moe_weight_gradient, weighted, grad, order, offsets, top_k, True, True)
    d_weights = call(moe_routing_gradient, parts, position, offsets, weights)
    return calls, (out, d_hidden, d_gate_up, d_down, d_weights)


@pytest.mark.parametrize("routing", ["random", "one", "gaps"])
def test_together_they_are_moe_mlp(routing):
    case = make_case(150, 16, 24, 3, 2, routing=routing)
    grad = torch.randn_like(case[0])
    permuted = moe_permute(case[4], 3)
    out, inner = moe_mlp(*case[:4], *permuted, True)
    check(calls_of(case, grad)[1], (out, *moe_mlp_backward(grad, *case[:4], inner, *permuted)), 1e-5)


def test_operators():
    case = make_case(9, 16, 24, 3, 2)
    for op, arguments in calls_of(case, torch.randn_like(case[0]))[0]:
        assert set(opcheck(op, arguments).values()) == {"SUCCESS"}, op


def test_the_queue():
    offsets = torch.tensor([0, 300, 300, 301, 429], dtype=torch.int32)
    queue = moe_schedule(offsets, 500).tolist()
    assert queue[0] == 5 and len(queue) >= 11
    assert queue[1:11] == [0, 0, 0, 128, 0, 256, 2, 300, 3, 301]
