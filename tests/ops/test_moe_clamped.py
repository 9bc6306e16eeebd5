"""``moe_clamped`` against a loop over experts in float64."""

from __future__ import annotations

import pytest
import torch
from ops.test_moe import make_case
from torch.library import opcheck

from cggr_compile.ops.moe_clamped import moe_clamped, moe_clamped_mlp, moe_clamped_mlp_backward
from cggr_compile.ops.moe_routing import moe_permute

ALPHA, LIMIT = 1.702, 1.5


def case_of(tokens=12, routing="random", dtype=torch.float64):
    hidden, gate_up, down, weights, experts = make_case(tokens, 6, 4, 3, 2, routing=routing, dtype=dtype)
    biases = torch.randn(3, 8, dtype=dtype), torch.randn(3, 6, dtype=dtype)
    leaves = (hidden, gate_up.mT.contiguous().mT, biases[0], down, biases[1], weights.double())
    return [t.requires_grad_() for t in leaves], experts


def loop(hidden, gate_up, gate_up_bias, down, down_bias, weights, experts):
    out = torch.zeros_like(hidden)
    for expert in range(gate_up.shape[0]):
        inner = hidden @ gate_up[expert].T + gate_up_bias[expert]
        gate, up = inner[:, ::2].clamp(max=LIMIT), inner[:, 1::2].clamp(-LIMIT, LIMIT)
        term = ((up + 1) * gate * torch.sigmoid(ALPHA * gate)) @ down[expert].T + down_bias[expert]
        out = out + term * (weights * (experts == expert)).sum(1, keepdim=True)
    return out


@pytest.mark.parametrize("routing", ["random", "one", "null", "nobody", "gaps"])
@pytest.mark.parametrize("tokens", [0, 1, 12])
def test_equals_a_loop_over_experts(tokens, routing):
    leaves, experts = case_of(tokens, routing)
    got, wanted = moe_clamped(*leaves, experts, ALPHA, LIMIT), loop(*leaves, experts)
    torch.testing.assert_close(got, wanted)
    grad = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_the_comparison_can_fail():
    leaves, experts = case_of()
    assert not torch.allclose(moe_clamped(*leaves, experts, ALPHA, 9.0), loop(*leaves, experts))


def test_operators():
    leaves, experts = case_of()
    permuted, numbers = moe_permute(experts, 3), (ALPHA, LIMIT)
    detached = [t.detach() for t in leaves]
    inner = moe_clamped_mlp(*detached, *permuted, *numbers, True)[1]
    for op, arguments in (
        (moe_clamped_mlp, (*leaves, *permuted, *numbers, True)),
        (moe_clamped_mlp, (*detached, *permuted, *numbers, False)),
        (moe_clamped_mlp_backward, (torch.randn_like(detached[0]), *detached, inner, *permuted, *numbers)),
        (moe_clamped, (*leaves, experts, *numbers)),
    ):
        assert set(opcheck(op, arguments).values()) == {"SUCCESS"}
    with pytest.raises(RuntimeError, match="save"):
        moe_clamped_mlp(*leaves, *permuted, *numbers, False)
