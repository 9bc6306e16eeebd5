"""``attention_rows_backward``: the reference against autograd of ordinary dense attention.

``make_case``, ``errors`` and ``poisoned`` serve tests/kernels and tests/gpu too.
"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch.library import opcheck

import cggr_compile.ops  # noqa: F401  (registers)
from cggr_compile.ops import attention_rows
from cggr_compile.ops.attention_rows import attention_rows_backward, attention_rows_backward_reference


def _attention(query, key, value, mask, scale, causal, softcap):
    """(out, logsumexp) of dense attention, written without any of the code under test; zeros where nothing is seen."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if mask is not None:
        scores = scores + (torch.zeros_like(scores).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask)
    if causal:
        scores = scores + torch.full_like(scores[0, 0], -math.inf).triu(1)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return torch.einsum("bhij,bhjd->bhid", weights, value), scores.logsumexp(-1)


def _at(tensor, rows):
    """The selected positions of [B, H, S, ...], as a permuted view of [B, K, H, ...], the layout models produce."""
    index = rows[:, None, :].expand(-1, tensor.shape[1], -1)
    if tensor.dim() == 4:
        index = index[..., None].expand(-1, -1, -1, tensor.shape[3])
    return tensor.gather(2, index).transpose(1, 2).contiguous().transpose(1, 2)


def make_case(
    slots,
    length,
    dim,
    *,
    causal=True,
    mask=None,
    all_keys=False,
    batch=2,
    heads=2,
    kv_heads=None,
    unused=0,
    softcap=0.0,
    dtype=torch.float32,
    device="cpu",
):
    """(arguments of the op, [dq, dk, dv] by autograd in float64 through attention over every position)."""

    def values(count):
        return torch.randn(batch, length, count, dim, device=device).to(dtype).transpose(1, 2)

    kv_heads = kv_heads or heads
    rows = torch.stack([torch.randperm(length)[:slots] for _ in range(batch)])
    if mask == "additive":  # [1, heads, K, S]: one mask for the batch, which takes the same rows everywhere
        rows[:] = rows[:1].clone()
    rows[:, : slots - unused] = rows[:, : slots - unused].sort().values
    rows = rows.to(device)
    query, key, value, grad = values(heads), values(kv_heads), values(kv_heads), _at(values(heads), rows)
    grad[:, :, slots - unused :] = 0
    full_mask = None
    if mask == "bool":
        full_mask = torch.rand(batch, 1, length, length, device=device) > 0.3
        if length > 1:
            full_mask[0, :, rows[0, 0]] = False  # a query that sees nothing
    elif mask == "additive":
        full_mask = torch.randn(1, heads, length, length, device=device).to(dtype)
        full_mask[..., torch.rand(length) > 0.8] = -math.inf
    scale = dim**-0.5

    wide = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    wide_mask = full_mask.double() if mask == "additive" else full_mask
    out, logsumexp = _attention(*wide, wide_mask, scale, causal, softcap)
    full_grad = torch.zeros_like(out)
    full_grad.scatter_(2, rows[:, None, :, None].expand_as(grad), grad.double())
    expected = list(torch.autograd.grad(out, wide, full_grad))
    expected[0] = _at(expected[0], rows)
    if not all_keys:
        expected[1:] = (_at(tensor, rows) for tensor in expected[1:])

    row_mask = None
    if full_mask is not None:
        index = rows[: full_mask.shape[0], None, :, None]
        row_mask = full_mask.gather(2, index.expand(-1, full_mask.shape[1], -1, length))
    arguments = (
        *(grad, _at(query, rows), key, value, _at(out.detach().to(dtype), rows)),
        *(_at(logsumexp.detach().float(), rows), rows, row_mask, scale, causal, all_keys),
        *([softcap] if softcap else []),
    )
    return arguments, expected


def errors(got, expected):
    """Norm-wise relative errors of dq, dk, dv. One that is all but zero (one key: dq = 0) is measured against dv."""
    floor = 0.1 * float(expected[2].double().norm())
    return [
        float((g.double() - e.double()).norm()) / max(float(e.double().norm()), floor, 1e-30)
        for g, e in zip(got, expected, strict=True)
    ]


@contextlib.contextmanager
def poisoned(device="cpu"):
    """New uninitialised tensors hold NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.ones(3, device=device).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("all_keys", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "additive"])
@pytest.mark.parametrize("causal", [False, True])
def test_reference_equals_autograd(causal, mask, all_keys):
    for slots, length in [(1, 1), (1, 9), (5, 17), (12, 12)]:
        arguments, expected = make_case(
            slots, length, 8, causal=causal, mask=mask, all_keys=all_keys, batch=3, unused=slots // 3
        )
        wide = [a.double() if isinstance(a, torch.Tensor) and a.dtype == torch.float32 else a for a in arguments]
        got = attention_rows_backward_reference(*wide)
        assert [tensor.shape for tensor in got] == [tensor.shape for tensor in expected]
        assert max(errors(got, expected)) < 2e-6, (slots, length)  # scores are float32 in the reference


@pytest.mark.parametrize("all_keys", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "additive"])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_of_queries_equal_autograd(causal, mask, all_keys, monkeypatch):
    monkeypatch.setattr(attention_rows, "QUERIES", 4)
    modes = dict(causal=causal, mask=mask, all_keys=all_keys, softcap=0.7 if mask == "bool" else 0.0)
    for slots, length, unused in [(1, 1, 0), (4, 9, 0), (5, 17, 3), (16, 40, 9), (12, 12, 0)]:
        arguments, expected = make_case(slots, length, 8, batch=3, heads=4, kv_heads=2, unused=unused, **modes)
        got = attention_rows_backward(*arguments)
        assert [(g.shape, g.stride()) for g in got] == [
            (r.shape, r.stride()) for r in attention_rows_backward_reference(*arguments)
        ]
        used = slice(None) if all_keys else slice(slots - unused)  # keys of unused slots take no part
        got = [got[0], *(g[:, :, used] for g in got[1:])]
        assert max(errors(got, [expected[0], *(e[:, :, used] for e in expected[1:])])) < 1e-5, (slots, length)


@pytest.mark.parametrize("all_keys", [False, True])
def test_sums_of_blocks_are_rounded_once(all_keys, monkeypatch):
    arguments, expected = make_case(64, 64, 8, all_keys=all_keys, dtype=torch.bfloat16)
    whole = errors(attention_rows_backward(*arguments), expected)
    monkeypatch.setattr(attention_rows, "QUERIES", 2)
    blocks = errors(attention_rows_backward(*arguments), expected)
    assert max(blocks) < 1.2 * max(whole)


@pytest.mark.parametrize("all_keys", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "additive"])
def test_soft_cap(mask, all_keys):
    arguments, expected = make_case(5, 17, 8, mask=mask, all_keys=all_keys, unused=2, softcap=0.7)
    assert max(errors(attention_rows_backward(*arguments), expected)) < 1e-5
    assert max(errors(attention_rows_backward(*arguments[:-1], 0.9), expected)) > 1e-2
    assert set(opcheck(attention_rows_backward, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("all_keys", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "additive"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_key_heads_are_shared(kv_heads, mask, all_keys):
    arguments, expected = make_case(5, 17, 8, heads=4, kv_heads=kv_heads, mask=mask, all_keys=all_keys, unused=2)
    got = attention_rows_backward(*arguments)
    assert [tensor.shape for tensor in got] == [tensor.shape for tensor in expected]
    assert max(errors(got, expected)) < 1e-5


def test_the_comparison_can_fail():
    arguments, expected = make_case(5, 17, 8, all_keys=True)
    assert max(errors(attention_rows_backward(*arguments), expected)) < 1e-5
    for wrong in ((*arguments[:9], False, True), (*arguments[:6], arguments[6].flip(0), *arguments[7:])):
        assert max(errors(attention_rows_backward(*wrong), expected)) > 1e-2


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
@pytest.mark.parametrize("all_keys", [False, True])
def test_opcheck(all_keys, mask):
    for kv_heads in (1, 2):
        arguments, _ = make_case(5, 17, 8, all_keys=all_keys, mask=mask, batch=1, kv_heads=kv_heads)
        outcome = opcheck(attention_rows_backward, arguments)
        assert set(outcome.values()) == {"SUCCESS"}, outcome
