"""``token_log_probs`` against the logits. Its helpers serve tests/kernels and tests/gpu too."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import cggr_compile.ops.head_gradients as backward
import cggr_compile.ops.token_log_probs as forward
from cggr_compile.ops.head_gradients import head_gradients
from cggr_compile.ops.token_log_probs import token_log_probs

VALUES = ("log_prob", "entropy", "logsumexp", "log_sum_squares", "mean_logit", "top1_hit")
NAMES = (*VALUES, "d_hidden", "d_weight", "d_bias")
MODES = [dict(), dict(bias=True, softcap=2.0, scale=0.3), dict(scale=0.5)]


def make_case(
    rows, vocab, width, *, bias=False, scale=1.0, softcap=0.0, labelled=0.8, dtype=torch.float32, device="cpu"
):
    """hidden, weight, bias, labels, scale, softcap; where there are labels at all, one lies past the vocabulary."""
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = (3.0 * torch.randn(vocab, width, device=device) / width**0.5).to(dtype)
    labels = torch.randint(0, vocab, (rows,), device=device)
    labels[torch.rand(rows, device=device) >= labelled] = -100
    if 0 < labelled < 1:
        labels[-1:] = vocab + 7
    return hidden, weight, torch.randn(vocab, device=device).to(dtype) if bias else None, labels, scale, softcap


def make_grads(case, wanted=VALUES[:5]):
    """The gradient of each value, None for those that nobody differentiates."""
    dtype = torch.float64 if case[0].dtype == torch.float64 else torch.float32
    return [torch.randn_like(case[3], dtype=dtype) if name in wanted else None for name in VALUES[:5]]


def call(case, extra=(True, True, True), rows=(None, None, None)):
    hidden, weight, bias, labels, *numbers = case
    return token_log_probs(hidden, weight, bias, labels, *rows, *numbers, *extra)


def run(case, grads, extra=(True, True, True)):
    """The six values, and the gradients that they have under ``grads``."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in case[:3]]
    values = call((*leaves, *case[3:]), extra)
    outputs = [(v, g) for v, g in zip(values, grads, strict=False) if g is not None]
    found = torch.autograd.grad([v for v, _ in outputs], [t for t in leaves if t is not None], [g for _, g in outputs])
    return (*(v.detach() for v in values), *found)


def of_logits(hidden, weight, bias, labels, scale, softcap):
    """The values from all logits, without any of the code under test."""
    z = F.linear(hidden, weight, bias) * scale
    z = torch.tanh(z / softcap) * softcap if softcap else z
    p, log_p = z.softmax(-1), z.log_softmax(-1)
    known = (labels >= 0) & (labels < weight.shape[0])
    at = torch.where(known, labels, 0).long()[..., None]
    label_z = z.gather(-1, at)[..., 0]
    values = (
        log_p.gather(-1, at)[..., 0],
        -(p * log_p).sum(-1),
        z.logsumexp(-1),
        p.square().sum(-1).log(),
        z.mean(-1),
        (label_z.detach() >= z.detach().amax(-1)).to(z.dtype),
    )
    return tuple(torch.where(known, value, 0.0) for value in values)


def expected(case, grads):
    """In float64."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in case[:3]]
    values = of_logits(*leaves, *case[3:])
    total = sum((v * g.double()).sum() for v, g in zip(values, grads, strict=False) if g is not None)
    inputs = [t for t in leaves if t is not None]
    found = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    return (*(v.detach() for v in values), *found)


def check(got, wanted, tolerance, names=NAMES):
    """Errors relative to the largest entry: gradients of a float16 model are sums of rounded terms."""
    for name, a, b in zip(names, got, wanted, strict=False):
        assert a.shape == b.shape, name
        assert a.isfinite().all(), name
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=0.1) if a.numel() else torch.zeros(())
        assert error < tolerance, f"{name}: {error.item():.1e}"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9),
    st.integers(1, 40),
    st.sampled_from(MODES),
    st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    st.sets(st.sampled_from(VALUES[:5]), min_size=1),
    st.integers(1, 50),
    st.booleans(),
)
def test_equals_the_values_of_the_logits(rows, vocab, modes, labelled, wanted, workspace, pack):
    case = make_case(rows, vocab, 6, labelled=labelled, **modes)
    grads = make_grads(case, wanted)
    with pytest.MonkeyPatch.context() as patch:
        for module in (forward, backward):
            patch.setattr(module, "WORKSPACE", {"cpu": workspace})
        patch.setattr(backward, "COLUMNS", 3)
        got = run(case, grads, (True, True, pack))
    check(got, expected(case, grads), 1e-4)


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("value", [*range(5), None])
def test_gradcheck(value, modes, monkeypatch):
    """Of every value, and of their sum."""
    monkeypatch.setattr(backward, "WORKSPACE", {"cpu": 10})
    monkeypatch.setattr(backward, "COLUMNS", 2)
    case = make_case(4, 7, 3, dtype=torch.float64, **modes)
    inputs = [t.requires_grad_() for t in case[:3] if t is not None]

    def function(hidden, weight, bias=None):
        values = call((hidden, weight, bias, *case[3:]))
        return sum(values[:5]) if value is None else values[value]

    assert torch.autograd.gradcheck(function, inputs)


def test_without_a_label_nothing():
    hidden, weight, bias, labels, *numbers = make_case(6, 20, 5, bias=True, labelled=0.0)
    hidden = torch.full_like(hidden, torch.nan)  # a position that nobody reads
    hidden[2], labels[2] = 1.0, 3
    case = (hidden, weight, bias, labels, *numbers)
    values = run(case, make_grads(case))
    others = torch.arange(6) != 2
    for name, value in zip(NAMES[:7], values, strict=False):
        assert not value[others].any() and value.isfinite().all(), name
    assert values[7].isfinite().all() and values[8].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    case = make_case(20, 60, 16, dtype=dtype, bias=True)
    grads = make_grads(case)
    got = run(case, grads)
    assert [t.dtype for t in got] == [torch.float32] * 6 + [dtype] * 3
    wanted = expected(case, grads)
    check(got[:5], wanted[:5], 3e-2)  # not the hit: two logits that are the same in 16 bits
    check(got[6:], wanted[6:], 3e-2, NAMES[6:])


def test_ties_are_hits():
    weight = torch.zeros(9, 2)
    weight[3:5] = 1.0
    case = (torch.ones(4, 2), weight, None, torch.tensor([3, 4, 5, -100]), 1.0, 0.0)
    hit = call(case)[5]
    assert hit.tolist() == [1.0, 1.0, 0.0, 0.0] and not hit.requires_grad


def test_what_is_not_wanted_is_empty():
    case = make_case(6, 20, 5)
    assert [value.numel() for value in call(case, (False, False, True))] == [6, 6, 6, 0, 0, 6]
    wanted = expected(case, make_grads(case, ["entropy"]))
    check(run(case, [None, torch.ones(6)], (False, False, True))[:3], wanted[:3], 1e-4)


def random_rows(batch, length, slots, used):
    """rows and weights as a sampled selection has them: distinct positions, some slots unused."""
    rows = torch.rand(batch, length).argsort(1)[:, :slots]
    weights = 1.0 / torch.rand(batch, slots).clamp(min=0.2)
    weights[:, used:] = 0.0
    return rows, weights


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 8), st.integers(0, 8), st.integers(0, 8), st.sampled_from(MODES))
def test_the_gradient_of_rows(batch, length, slots, used, modes):
    """Values of all positions; the gradient of those at the rows, times their weights, at row_hidden."""
    slots = min(slots, length)
    hidden, weight, bias, labels, *numbers = make_case(batch * length, 12, 5, **modes)
    hidden, labels = hidden.view(batch, length, 5), labels.view(batch, length)
    rows, weights = random_rows(batch, length, slots, used)
    at = rows[:, :, None].expand(-1, -1, 5)
    leaves = [t.clone().requires_grad_() for t in (hidden.gather(1, at), weight, bias) if t is not None]
    full = hidden.clone().requires_grad_()
    values = call(
        (full, leaves[1], leaves[2] if bias is not None else None, labels, *numbers), rows=(leaves[0], rows, weights)
    )
    grads = make_grads((hidden, weight, bias, labels))
    for name, value, wanted in zip(VALUES, values, of_logits(hidden, weight, bias, labels, *numbers), strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-4, msg=name)
    found = torch.autograd.grad(values[:5], [*leaves, full], grads, allow_unused=True)
    assert found[-1] is None
    twins = [t.detach().double().requires_grad_() for t in leaves]
    picked = of_logits(*twins[:2], twins[2] if bias is not None else None, labels.gather(1, rows), *numbers)
    total = sum((v * g.gather(1, rows) * weights).sum() for v, g in zip(picked, grads, strict=False))
    check(found[:-1], torch.autograd.grad(total, twins), 1e-4, NAMES[6:])


def test_an_unused_slot_counts_nothing():
    """Nor does one without a label, whatever the logits and the gradient are at its position."""
    hidden, weight, _, labels, *numbers = make_case(6, 12, 5, labelled=1.0)
    hidden[1:3], labels[2] = 1e4, -100
    row_hidden = hidden[:3].clone().requires_grad_()
    rows, weights = torch.tensor([0, 1, 2]), torch.tensor([1.0, 0.0, 1.0])
    values = call((hidden, weight.requires_grad_(), None, labels, *numbers), rows=(row_hidden, rows, weights))
    torch.autograd.backward(values[:5], [torch.tensor([1.0, torch.inf, torch.nan, 1, 1, 1])] * 5)
    assert row_hidden.grad[0].any() and not row_hidden.grad[1:].any()
    assert weight.grad.isfinite().all()


def test_no_logits_are_saved():
    rows, vocab = 40, 300
    case = make_case(rows, vocab, 8, bias=True)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    inputs = [t.requires_grad_() for t in case[:3]]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call((*inputs, *case[3:]))
    assert len(sizes) > 4 and max(sizes) == case[1].numel() < rows * vocab


def test_only_what_is_needed_is_computed(monkeypatch):
    case = make_case(6, 20, 5, bias=True)
    masks = []
    original = backward.head_gradients
    monkeypatch.setattr(forward, "head_gradients", lambda *a: masks.append(a[-1]) or original(*a))
    call((case[0].requires_grad_(), *case[1:]))[0].sum().backward()
    assert masks == [[True, False, False]]
    grads, wanted = make_grads(case, ["log_prob"]), expected(case, make_grads(case, ["log_prob"]))
    for mask in ([True, False, False], [False, True, False], [False, False, True]):
        known = (case[3] >= 0) & (case[3] < 20)
        on_label = torch.where(known, grads[0], 0.0)
        wanted = expected(case, grads)
        found = head_gradients(
            *(t if t is None else t.detach() for t in case[:4]),
            wanted[2].float(),
            -on_label,
            None,
            None,
            on_label,
            None,
            *case[4:],
            True,
            mask,
        )
        for want, gradient, reference in zip(mask, found, wanted[6:], strict=True):
            assert want or gradient.numel() == 0
            if want:
                check([gradient], [reference], 1e-4)


def test_strides_and_leading_axes():
    hidden, weight, bias, labels, *numbers = make_case(8, 30, 6, bias=True)
    case = (hidden, weight, bias, labels, *numbers)
    grads = make_grads(case)
    wanted = expected(case, grads)
    wide, columns = torch.stack([hidden, hidden], -1)[..., 0], weight.t().contiguous().t()
    check(run((wide, columns, *case[2:]), grads), wanted, 1e-4)
    shaped = (hidden.view(2, 4, 6), weight, bias, labels.view(2, 4).int(), *numbers)
    got = run(shaped, [g.view(2, 4) for g in grads])
    assert got[0].shape == (2, 4) and got[6].shape == (2, 4, 6)
    check([*(v.view(8) for v in got[:6]), got[6].view(8, 6), *got[7:]], wanted, 1e-4)


def test_large_logits():
    case = make_case(6, 100, 16)
    case = (case[0] * 100.0, *case[1:])
    grads = make_grads(case)
    check(run(case, grads), expected(case, grads), 1e-3)


BAD = {
    "hidden must be floats": (0, torch.zeros(5, 4, dtype=torch.int64)),
    "weight must be .vocabulary, 4.": (1, torch.randn(9, 3)),
    "weight must have the dtype of hidden": (1, torch.randn(9, 4).half()),
    "bias must be .9.": (2, torch.randn(4)),
    "labels must be integers .5.": (3, torch.zeros(5)),
    "row_hidden, rows and weights must be given together": (5, torch.zeros(2, dtype=torch.int64)),
    "softcap must be >= 0": (8, -1.0),
}
BAD_ROWS = {
    "rows must be int64": (5, torch.zeros(1, 2, dtype=torch.int64)),
    "weights must be float32 .2.": (6, torch.ones(3)),
    "row_hidden must be torch.float32 .2, 4.": (4, torch.ones(2, 3)),
}


@pytest.mark.parametrize("message", [*BAD, *BAD_ROWS])
def test_bad_arguments(message):
    hidden, weight, bias, labels, *numbers = make_case(5, 9, 4)
    rows = (None, None, None) if message in BAD else (torch.randn(2, 4), torch.tensor([0, 3]), torch.ones(2))
    arguments = [hidden, weight, bias, labels, *rows, *numbers, True, True, True]
    position, value = (BAD | BAD_ROWS)[message]
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        token_log_probs(*arguments)


def test_operators():
    hidden, weight, bias, labels, *numbers = make_case(6, 9, 4, bias=True, softcap=3.0)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    opcheck(token_log_probs, (*leaves, labels, None, None, None, *numbers, True, True, True))
    opcheck(token_log_probs, (leaves[0], weight, None, labels, None, None, None, *numbers, False, False, False))
    rows = (torch.randn(2, 2, 4, requires_grad=True), torch.tensor([[0, 2], [1, 2]]), torch.ones(2, 2))
    full = hidden.detach().view(2, 3, 4)
    opcheck(token_log_probs, (full, leaves[1], None, labels.view(2, 3), *rows, *numbers, True, False, True))
    some = [torch.randn(6) for _ in range(6)]
    for mask, given_ in (([True, True, True], some), ([False, True, False], [*some[:2], None, None, some[4], None])):
        opcheck(head_gradients, (*(t.detach() for t in leaves), labels, *given_, *numbers, True, mask))


def test_in_generated_code():
    hidden, weight, bias, labels, *numbers = make_case(8, 30, 5, bias=True, softcap=2.0)
    rows, weights = torch.tensor([1, 5, 6]), torch.tensor([1.0, 2.0, 0.0])
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def step(hidden, weight, bias):
        hidden = hidden.sin()
        case = (hidden, weight, bias, labels, *numbers)
        everywhere = call(case)
        at_rows = call((hidden.detach(), *case[1:]), rows=(hidden[rows], rows, weights))
        return sum((a * b.cos()).sum() for a, b in zip(everywhere[:5], at_rows[:5], strict=True))

    wanted = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.compile(step, fullgraph=True)(*leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), wanted)


def test_a_uniform_distribution():
    case = (torch.zeros(2, 3), torch.randn(8, 3), None, torch.tensor([1, 2]), 1.0, 0.0)
    log_prob, entropy, _, squares, mean, hit = call(case)
    torch.testing.assert_close(entropy, torch.full((2,), math.log(8)))
    torch.testing.assert_close(log_prob, -entropy)
    torch.testing.assert_close(squares, -entropy)
    assert not mean.any() and hit.all()


def test_the_comparison_can_fail():
    case = make_case(20, 50, 8)
    grads = make_grads(case)
    with pytest.raises(AssertionError):
        check(run((*case[:3], case[3].roll(1), *case[4:]), grads), expected(case, grads), 1e-4)
    for left_out in range(5):
        others = [None if number == left_out else grad for number, grad in enumerate(grads)]
        with pytest.raises(AssertionError):
            check(run(case, others), expected(case, grads), 1e-4)
