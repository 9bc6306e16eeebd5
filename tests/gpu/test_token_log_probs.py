"""``token_log_probs`` and ``linear_cross_entropy``, which is made of it, on a GPU: parity with float64, both ways of
loading tiles, rows left out, memory, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from ops import test_linear_cross_entropy as of_cross_entropy
from ops.test_token_log_probs import NAMES, call, check, expected, make_case, make_grads, run

import cggr_compile.ops.head_gradients as backward
from cggr_compile import token_log_probs
from cggr_compile.kernels import head_gradients as gradients
from cggr_compile.kernels import token_log_probs as kernels
from cggr_compile.kernels.common import has_descriptors

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
MODES = [dict(), dict(bias=True, softcap=20.0, scale=0.5, labelled=0.3), dict(bias=True, labelled=0.05)]
SIZES = [(1, 100, 64), (300, 5000, 200), (513, 4096, 576), (130, 50257, 768), (64, 2049, 33)]


def check_all(got, wanted, dtype):
    """Hits are left out: the largest logit of 16 bits may be another one's."""
    check((*got[:5],), wanted[:5], 1e-3)
    check(got[6:], wanted[6:], TOLERANCE[dtype], NAMES[6:])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "vocab", "width"), SIZES)
@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("pack", [False, True])
def test_equals_the_values_of_the_logits(rows, vocab, width, dtype, modes, pack):
    case = make_case(rows, vocab, width, dtype=dtype, device="cuda", **modes)
    grads = make_grads(case)
    check_all(run(case, grads, (True, True, pack)), expected(case, grads), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "vocab", "width"), SIZES)
@pytest.mark.parametrize(
    "modes", [dict(), dict(bias=True, softcap=20.0, scale=0.5, smoothing=0.1), dict(bias=True, smoothing=0.1)]
)
def test_cross_entropy(rows, vocab, width, dtype, modes):
    case = of_cross_entropy.make_case(rows, vocab, width, dtype=dtype, device="cuda", **modes)
    grads = of_cross_entropy.make_grads(case)
    got, wanted = of_cross_entropy.run(case, grads), of_cross_entropy.expected(case, grads)
    of_cross_entropy.check(got[:2], wanted[:2], 1e-3)
    of_cross_entropy.check(got, wanted, TOLERANCE[dtype])


def test_hits():
    case = make_case(600, 5000, 128, dtype=torch.bfloat16, device="cuda")
    z = case[0].float() @ case[1].float().T
    labels = torch.where(torch.arange(600, device="cuda") % 2 == 0, z.argmax(1), z.topk(50, 1).indices[:, -1])
    hit = call((*case[:3], labels, 1.0, 0.0))[5]
    assert hit[::2].mean() > 0.99 and not hit[1::2].any()


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("descriptors", [False, True])
def test_both_ways_of_loading_in_several_spans(descriptors, pack, monkeypatch):
    case = make_case(200, 6000, 128, dtype=torch.bfloat16, device="cuda", bias=True)
    if descriptors and not has_descriptors(case[0]):
        pytest.skip("no tensor descriptors before Hopper")
    originals = kernels.token_log_probs_triton, gradients.logit_gradient_triton
    spans = []

    def counted(*arguments):
        spans.append(arguments[-2])
        originals[1](*arguments, DESCRIPTORS=descriptors)

    monkeypatch.setattr(kernels, "token_log_probs_triton", lambda *a: originals[0](*a, DESCRIPTORS=descriptors))
    monkeypatch.setattr(gradients, "logit_gradient_triton", counted)
    monkeypatch.setattr(backward, "WORKSPACE", dict.fromkeys(backward.WORKSPACE, 200 * 2048))
    grads = make_grads(case)
    check_all(run(case, grads, (True, True, pack)), expected(case, grads), torch.bfloat16)
    assert len(spans) == 3


@pytest.mark.parametrize("library", [False, True])
def test_both_products_of_the_first_rows(library, monkeypatch):
    case = make_case(1000, 6000, 256, dtype=torch.bfloat16, device="cuda", labelled=0.2)
    original = gradients.library_takes_rows
    asked = []

    def takes(left, right):
        asked.append(original(left, right))
        return library and asked[-1]

    monkeypatch.setattr(gradients, "library_takes_rows", takes)
    grads = make_grads(case)
    check_all(run(case, grads), expected(case, grads), torch.bfloat16)
    assert asked
    if library and not all(asked):
        pytest.skip("the library does not take these here")


def test_rows_without_a_label_are_not_read():
    case = make_case(2000, 5000, 128, dtype=torch.bfloat16, device="cuda", labelled=0.05)
    grads = make_grads(case)
    wanted = expected(case, grads)
    unlabelled = (case[3] < 0) | (case[3] >= 5000)
    case[0][unlabelled] = torch.nan
    check_all(run(case, grads), wanted, torch.bfloat16)
    none = (*case[:3], torch.full_like(case[3], -100), *case[4:])
    assert not any(value.any() for value in run(none, grads))


def test_gradients_of_rows():
    case = hidden, weight, bias, labels, *numbers = make_case(1024, 5000, 128, dtype=torch.bfloat16, device="cuda")
    rows, weights = torch.randperm(1024, device="cuda")[:300], torch.rand(300, device="cuda") + 1.0
    weights[280:] = 0.0
    row_hidden, leaf = hidden[rows].clone().requires_grad_(), weight.clone().requires_grad_()
    grads = make_grads(case)
    values = call((hidden, leaf, bias, labels, *numbers), rows=(row_hidden, rows, weights))
    found = torch.autograd.grad(values[:5], (row_hidden, leaf), grads)
    wanted = expected((hidden[rows], weight, bias, labels[rows], *numbers), [grad[rows] * weights for grad in grads])
    check((*values[:5],), expected(case, grads)[:5], 1e-3)
    check(found, wanted[6:], 2e-2, NAMES[6:])


@pytest.mark.parametrize("labelled", [1.0, 0.25])
def test_peak_memory_is_not_the_logits(labelled):
    rows, vocab, width = 16384, 100_000, 64
    case = make_case(rows, vocab, width, dtype=torch.bfloat16, device="cuda", labelled=labelled)
    grads = make_grads(case, ["log_prob"])
    run(case, grads)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(case, grads)
    of_weight = 2 * vocab * width
    partials = 4 * 5 * rows * (vocab // 2048 + 1)
    workspace = 2 * backward.WORKSPACE["packed"]
    assert torch.cuda.max_memory_allocated() - before < workspace + 2 * of_weight + partials + rows * width * 4 * 6
    assert workspace < 2 * rows * vocab / 10


def test_no_synchronisation_and_replays():
    case = make_case(256, 4096, 64, dtype=torch.bfloat16, device="cuda", bias=True)
    grads = make_grads(case)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(case, grads)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            got = run(case, grads)
        case[0].copy_(torch.randn_like(case[0]))
        case[3].copy_(case[3].roll(7))  # another number of labels at other rows
        case[3][:100] = -100
        graph.replay()
    torch.cuda.synchronize()
    check_all(got, expected(case, grads), torch.bfloat16)


def test_compiled_and_under_autocast():
    hidden = torch.randn(4, 100, 64, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", requires_grad=True)
    labels = torch.randint(0, 1000, (4, 100), device="cuda")
    labels[:, :60] = -100

    def step(hidden, weight):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            values = token_log_probs(hidden, weight, labels, temperature=0.8)
        return (values.log_prob - 0.1 * values.entropy).sum()

    wanted = torch.autograd.grad(step(hidden, weight), (hidden, weight))
    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(hidden, weight), (hidden, weight))
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


def test_float64_takes_the_reference():
    case = make_case(20, 300, 16, dtype=torch.float64, device="cuda")
    grads = make_grads(case)
    check(run(case, grads), expected(case, grads), 1e-10)
