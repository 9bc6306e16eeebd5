"""``moe`` against a loop over tokens and experts in float64. Its helpers serve tests/kernels, modules and gpu too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import cggr_compile.ops  # noqa: F401  (registers)
from cggr_compile.ops.moe import moe, moe_mlp, moe_mlp_backward
from cggr_compile.ops.moe_routing import moe_permute, moe_top_experts

NAMES = ("out", "d_hidden", "d_gate_up", "d_down", "d_weights")


def make_case(tokens, hidden, inner, experts, top_k, *, routing="random", dtype=torch.float32, device="cpu"):
    """Arguments of ``moe``. routing: random, or tokens that all go to the last expert first ("one"), a third of the
    assignments to none ("null"), all of them ("nobody"), only even experts ("gaps")."""
    if routing == "gaps":
        chosen = torch.rand(tokens, (experts + 1) // 2).argsort(1)[:, :top_k] * 2
        chosen = torch.cat([chosen, torch.full((tokens, top_k - chosen.shape[1]), -1)], 1)
    else:
        chosen = torch.rand(tokens, experts).argsort(1)[:, :top_k]
    if routing == "one":
        chosen = torch.full_like(chosen, experts)
        chosen[:, 0] = experts - 1
    if routing == "null":
        chosen = torch.where(torch.rand(chosen.shape) < 0.3, torch.randint(0, 2, chosen.shape) * (experts + 1) - 1,
                             chosen)  # fmt: skip
    if routing == "nobody":
        chosen = torch.full_like(chosen, experts)
    tensors = (
        torch.randn(tokens, hidden),
        torch.randn(experts, 2 * inner, hidden) * 2 / hidden**0.5,
        torch.randn(experts, hidden, inner) / inner**0.5,
    )
    weights = torch.rand(tokens, top_k) + 0.1
    return *(t.to(device, dtype) for t in tensors), weights.to(device), chosen.to(device)


def expected(hidden, gate_up, down, weights, experts, grad):
    """(out, gradients) by autograd in float64, expert after expert, every token: none of the code under test."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, gate_up, down, weights)]
    x, gu, d, w = leaves
    out = torch.zeros_like(x)
    for expert in range(gu.shape[0]):
        gate, up = (x @ gu[expert].T).chunk(2, -1)
        term = (gate / (1 + torch.exp(-gate)) * up) @ d[expert].T
        out = out + term * (w * (experts == expert)).sum(1, keepdim=True)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.double())


def run(case, grad):
    """(out, gradients) of ``moe``."""
    leaves = [t.detach().clone().requires_grad_() for t in case[:4]]
    out = moe(*leaves, case[4])
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def check(got, wanted, tolerance, names=NAMES):
    """Relative to the largest entry."""
    for name, a, b in zip(names, got, wanted, strict=True):
        assert a.shape == b.shape and a.isfinite().all(), name
        error = (a.double() - b).abs().max() if b.numel() else torch.zeros(())
        scale = b.abs().max() if b.numel() else torch.ones(())
        assert error <= tolerance * scale.clamp(min=1e-3), f"{name}: {error:.2e} of {scale:.2e}"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_equals_a_loop_over_experts(data):
    experts = data.draw(st.integers(1, 7))
    top_k = data.draw(st.integers(1, experts))
    routing = data.draw(st.sampled_from(["random", "one", "null", "nobody", "gaps"]))
    case = make_case(data.draw(st.integers(0, 20)), 5, 3, experts, top_k, routing=routing, dtype=torch.float64)
    grad = torch.randn_like(case[0])
    check(run(case, grad), expected(*case, grad), 1e-6 if case[3].dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    case = make_case(40, 32, 24, 4, 2, dtype=dtype)
    grad = torch.randn_like(case[0])
    got = run(case, grad)
    assert [t.dtype for t in got] == [dtype] * 4 + [torch.float32]
    check(got, expected(*case, grad), 1e-5 if dtype == torch.float32 else 3e-2)


def test_the_comparison_can_fail():
    case = make_case(20, 8, 4, 4, 2, dtype=torch.float64)
    grad = torch.randn_like(case[0])
    for at, wrong in ((4, case[4].flip(0)), (3, case[3].flip(1)), (1, case[1].roll(4, 1))):
        with pytest.raises(AssertionError):
            check(run((*case[:at], wrong, *case[at + 1 :]), grad), expected(*case, grad), 1e-6)


def test_gradcheck():
    hidden, gate_up, down, weights, experts = make_case(7, 4, 3, 3, 2, routing="null", dtype=torch.float64)
    leaves = [t.double().requires_grad_() for t in (hidden, gate_up, down, weights)]
    assert torch.autograd.gradcheck(lambda *inputs: moe(*inputs, experts), leaves)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 5), min_size=2, max_size=2), max_size=30), st.integers(1, 5))
def test_permutation(rows, num_experts):
    experts = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)
    check_permutation(moe_permute(experts, num_experts), experts, num_experts)


def check_permutation(got, experts, num_experts):
    """Against Python's sort, which is stable."""
    order, position, offsets = (t.tolist() for t in got)
    keys = [e if 0 <= e < num_experts else num_experts for e in experts.flatten().tolist()]
    assert order == sorted(range(len(keys)), key=lambda a: keys[a])
    assert [position[a] for a in order] == list(range(len(keys)))
    assert offsets == [sum(key < expert for key in keys) for expert in range(num_experts + 1)]
    assert {t.dtype for t in got} == {torch.int32}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(-2, 2), min_size=5, max_size=5), max_size=10), st.integers(1, 5))
def test_top_experts(rows, top_k):
    """Small integers, so that most rows hold ties."""
    scores = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    wanted = [sorted(range(5), key=lambda e: -row[e])[:top_k] for row in rows]
    assert moe_top_experts(scores, top_k).tolist() == wanted


def test_nothing_is_saved_without_a_gradient():
    case = make_case(6, 8, 4, 3, 2)
    permuted = moe_permute(case[4], 3)
    assert moe_mlp(*case[:4], *permuted, False)[1].shape == (0, 8)
    with pytest.raises(RuntimeError, match="save"):
        moe_mlp(case[0].requires_grad_(), *case[1:4], *permuted, False)


@pytest.mark.parametrize("routing", ["random", "null"])
def test_operators(routing):
    hidden, gate_up, down, weights, experts = make_case(6, 8, 4, 3, 2, routing=routing)
    leaves = [t.requires_grad_() for t in (hidden, gate_up, down, weights)]
    permuted = moe_permute(experts, 3)
    inner = moe_mlp(*leaves, *permuted, True)[1]
    detached = [t.detach() for t in leaves]
    for op, arguments in (
        (moe_top_experts, (torch.randn(5, 4), 2)),
        (moe_permute, (experts, 3)),
        (moe_mlp, (*leaves, *permuted, True)),
        (moe_mlp, (*detached, *permuted, False)),
        (moe_mlp_backward, (torch.randn_like(hidden), *detached, inner, *permuted)),
        (moe, (*leaves, experts)),
    ):
        assert set(opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("at", "wrong", "name"),
    [
        (0, torch.zeros(2, 3, 8), "hidden"),
        (1, torch.zeros(3, 7, 8), "gate_up"),
        (1, torch.zeros(3, 8, 9), "gate_up"),
        (1, torch.zeros(3, 8, 8).half(), "gate_up"),
        (2, torch.zeros(3, 4, 8), "down"),
        (2, torch.zeros(3, 8, 4).double(), "down"),
        (3, torch.zeros(6, 3), "weights"),
        (3, torch.zeros(6, 2).long(), "weights"),
        (4, torch.zeros(5, 2).long(), "experts"),
        (4, torch.zeros(6, 2), "experts"),
    ],
)
def test_errors_name_the_argument(at, wrong, name):
    case = list(make_case(6, 8, 4, 3, 2))
    case[at] = wrong
    with pytest.raises(ValueError, match=f"^{name} must"):
        moe(*case)
