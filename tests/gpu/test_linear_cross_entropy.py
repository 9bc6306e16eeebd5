"""``linear_cross_entropy`` on a GPU: parity with float64, both ways of loading tiles, memory, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from ops.test_linear_cross_entropy import check, expected, make_case, make_grads, run

import cggr_compile.ops.linear_cross_entropy as implementation
from cggr_compile.kernels import linear_cross_entropy as kernels
from cggr_compile.kernels.common import has_descriptors

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
MODES = [dict(), dict(bias=True, softcap=20.0, scale=0.5, smoothing=0.1), dict(bias=True, smoothing=0.1)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "vocab", "width"), [(1, 100, 64), (300, 5000, 200), (513, 4096, 576), (130, 50257, 768), (64, 2049, 33)]
)
@pytest.mark.parametrize("modes", MODES)
def test_equals_cross_entropy_of_the_logits(rows, vocab, width, dtype, modes):
    case = make_case(rows, vocab, width, dtype=dtype, device="cuda", **modes)
    grads = make_grads(case)
    got, wanted = run(case, grads), expected(case, grads)
    check(got[:2], wanted[:2], 1e-3)
    check(got, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("descriptors", [False, True])
def test_both_ways_of_loading_in_several_spans(descriptors, monkeypatch):
    case = make_case(200, 6000, 128, dtype=torch.bfloat16, device="cuda", bias=True)
    if descriptors and not has_descriptors(case[0]):
        pytest.skip("no tensor descriptors before Hopper")
    original = kernels.logit_gradient_triton
    spans = []

    def counted(*arguments):
        spans.append(arguments[-2])
        original(*arguments, DESCRIPTORS=descriptors)

    monkeypatch.setattr(kernels, "logit_gradient_triton", counted)
    monkeypatch.setattr(implementation, "WORKSPACE", {"cuda": 200 * 2048})
    grads = make_grads(case)
    check(run(case, grads), expected(case, grads), 2e-2)
    assert len(spans) == 3


def test_peak_memory_is_not_the_logits():
    rows, vocab, width = 16384, 100_000, 64
    case = make_case(rows, vocab, width, dtype=torch.bfloat16, device="cuda")
    grads = make_grads(case, False)
    run(case, grads)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(case, grads)
    gradients = 2 * vocab * width + 2 * rows * width
    partials = 4 * 4 * rows * (vocab // 2048 + 1)
    workspace = 2 * implementation.WORKSPACE["cuda"]
    assert torch.cuda.max_memory_allocated() - before < workspace + gradients + partials + rows * width * 4 * 4
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
        graph.replay()
    torch.cuda.synchronize()
    check(got, expected(case, grads), 2e-2)


def test_float64_takes_the_reference():
    case = make_case(20, 300, 16, dtype=torch.float64, device="cuda")
    grads = make_grads(case)
    check(run(case, grads), expected(case, grads), 1e-10)
