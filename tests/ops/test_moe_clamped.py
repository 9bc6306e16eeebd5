"""``moe_clamped`` against a loop over experts in float64. Its helpers serve tests/kernels and gpu too."""

from __future__ import annotations

import pytest
import torch
from ops import test_moe
from torch.library import opcheck

from cggr_compile.ops.moe_clamped import moe_clamped, moe_clamped_mlp, moe_clamped_mlp_backward
from cggr_compile.ops.moe_routing import moe_permute

ALPHA, LIMIT = 1.702, 1.5
# in 16 bits: rounded to the other side of a limit, an entry has a gradient or has none, and the comparison is void
NO_LIMIT = 100.0
NAMES = ("out", "d_hidden", "d_gate_up", "d_gate_up_bias", "d_down", "d_down_bias", "d_weights")


def make_case(
    tokens, hidden, inner, experts, top_k, *, routing="random", dtype=torch.float32, device="cpu", transposed=True
):
    """The six differentiable arguments, then the choice of experts. ``transposed``: matrices as gpt-oss stores them."""
    x, gate_up, down, weights, chosen = test_moe.make_case(tokens, hidden, inner, experts, top_k, routing=routing)
    biases = torch.randn(experts, 2 * inner), torch.randn(experts, hidden)
    stored = [m.mT.contiguous().mT if transposed else m for m in (gate_up, down)]
    parts = (x, stored[0], biases[0], stored[1], biases[1])
    weights = weights.double() if dtype == torch.float64 else weights
    return *(t.to(device, dtype) for t in parts), weights.to(device), chosen.to(device)


def expected(*case_and_grad):
    """(out, gradients) by autograd in float64, expert after expert, every token: none of the code under test."""
    *tensors, experts, grad = case_and_grad
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    hidden, gate_up, gate_up_bias, down, down_bias, weights = leaves
    out = torch.zeros_like(hidden)
    for expert in range(gate_up.shape[0]):
        inner = hidden @ gate_up[expert].T + gate_up_bias[expert]
        gate, up = inner[:, ::2].clamp(max=LIMIT), inner[:, 1::2].clamp(-LIMIT, LIMIT)
        term = ((up + 1) * gate * torch.sigmoid(ALPHA * gate)) @ down[expert].T + down_bias[expert]
        out = out + term * (weights * (experts == expert)).sum(1, keepdim=True)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.double())


def run(case, grad):
    """(out, gradients) of ``moe_clamped``."""
    leaves = [t.detach().requires_grad_() for t in case[:6]]
    out = moe_clamped(*leaves, case[6], ALPHA, LIMIT)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def check(got, wanted, tolerance):
    test_moe.check(got, wanted, tolerance, NAMES)


def check_norms(got, wanted, tolerance):
    """Relative, in norm: of many entries even float32 rounds some to the other side of the limit."""
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        assert a.shape == b.shape and a.isfinite().all(), name
        assert (a.double() - b).norm() <= tolerance * b.norm(), name


@pytest.mark.parametrize("routing", ["random", "one", "null", "nobody", "gaps"])
@pytest.mark.parametrize("tokens", [0, 1, 12])
def test_equals_a_loop_over_experts(tokens, routing):
    case = make_case(tokens, 6, 4, 3, 2, routing=routing, dtype=torch.float64, transposed=tokens == 12)
    grad = torch.randn_like(case[0])
    check(run(case, grad), expected(*case, grad), 1e-7)


def test_the_comparison_can_fail():
    case = make_case(12, 6, 4, 3, 2, dtype=torch.float64)
    grad = torch.randn_like(case[0])
    with pytest.raises(AssertionError):
        check(run((*case[:6], case[6].flip(0)), grad), expected(*case, grad), 1e-5)


def test_operators():
    *leaves, experts = make_case(12, 6, 4, 3, 2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in leaves]
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
