"""The fused scoring kernel on a GPU: parity with float64, both ways of loading tiles, sizes past 2**31, memory.

Under max-autotune, also its template: chosen, and not chosen.
"""

from __future__ import annotations

import pytest
import torch
from ops.test_score import check, expected, make_case, make_fp8_case, ranks
from torch._inductor.utils import run_and_get_code

from cggr_compile import lowerings
from cggr_compile.kernels import head_product
from cggr_compile.kernels import score as kernels
from cggr_compile.kernels.common import has_descriptors
from cggr_compile.ops.score import SPAN, score, score_partials, score_partials_reference

TOLERANCE = {torch.bfloat16: 1e-3, torch.float16: 1e-3, torch.float32: 1e-4}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "vocab", "width"), [(1, 100, 64), (300, 5000, 200), (513, 4096, 576), (130, 50257, 768), (64, 2049, 33)]
)
@pytest.mark.parametrize("modes", [dict(), dict(bias=True, softcap=20.0, scale=0.5)])
def test_equals_softmax(rows, vocab, width, dtype, modes):
    case = make_case(rows, vocab, width, dtype=dtype, device="cuda", **modes)
    check(score(*case), expected(*case), TOLERANCE[dtype])


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_both_ways_of_loading(dtype, descriptors):
    case = make_case(200, 6000, 128, dtype=dtype, device="cuda")
    arguments = (*case[:3], *case[4:], SPAN)
    if descriptors and not has_descriptors(case[0]):
        pytest.skip("no tensor descriptors before Hopper")
    got = kernels.score_partials_triton(*arguments, DESCRIPTORS=descriptors)
    wanted = score_partials_reference(*(t.double() if isinstance(t, torch.Tensor) else t for t in arguments))
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize(("rows", "vocab", "width"), [(300, 5000, 576), (1000, 50257, 2048)])
def test_8_bits(rows, vocab, width, descriptors):
    *arguments, row_scale, column_scale = make_fp8_case(rows, vocab, width, dtype=torch.bfloat16, device="cuda")
    if not kernels.multiplies_fp8(arguments[0].device) or (descriptors and not has_descriptors(arguments[0])):
        pytest.skip("no products of 8-bit floats, or no tensor descriptors")
    scales = (row_scale, column_scale)
    found = kernels.score_partials_triton(*arguments, SPAN, *scales, DESCRIPTORS=descriptors)
    wanted = score_partials_reference(*arguments, SPAN, *scales)
    # the device adds 8-bit products up with 14 bits: an error of every logit, in proportion to the largest
    logits = wanted[0].abs().amax(0).clamp(min=1.0)
    torch.testing.assert_close(found[[0, 3]] / logits, wanted[[0, 3]] / logits, atol=5e-3, rtol=0)
    small = logits < 5.0
    assert small.any()
    torch.testing.assert_close(found[:, :, small], wanted[:, :, small], atol=5e-2, rtol=5e-2)


def test_8_bits_without_their_products(monkeypatch):
    case = make_case(300, 5000, 128, dtype=torch.bfloat16, device="cuda")
    wanted = score(*case, True)
    monkeypatch.setattr(kernels, "multiplies_fp8", lambda device: False)
    for a, b in zip(score(*case, True), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=5e-3, rtol=5e-3)


def test_8_bits_keep_the_ranking():
    case = make_case(4000, 20000, 576, dtype=torch.bfloat16, device="cuda")
    case = (case[0] * torch.linspace(0.2, 4.0, 4000, device="cuda")[:, None].bfloat16(), *case[1:])
    found = [ranks(score(*case, fp8)[1]) for fp8 in (True, False)]
    assert torch.corrcoef(torch.stack(found))[0, 1] > 0.99


def test_strides_that_descriptors_cannot_take():
    hidden, weight, bias, labels, *rest = make_case(200, 3000, 128, dtype=torch.bfloat16, device="cuda")
    shifted = torch.empty(200 * 128 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(200, 128).copy_(hidden)
    assert not has_descriptors(shifted)
    wanted = expected(hidden, weight, bias, labels, *rest)
    check(score(shifted, weight, bias, labels, *rest), wanted, 1e-3)
    check(score(hidden.t().contiguous().t(), weight.t().contiguous().t(), bias, labels, *rest), wanted, 1e-3)


def test_more_logits_than_an_int32_counts_and_no_memory_for_them():
    rows, vocab, width = 45_000, 50_000, 64
    assert rows * vocab > 2**31
    hidden, weight, bias, labels, *rest = make_case(rows, vocab, width, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = score(hidden, weight, bias, labels, *rest)
    # a few float32 copies of the hidden rows for the labels' logits; the logits would be 2 * vocab bytes a row
    assert torch.cuda.max_memory_allocated() - before < rows * vocab / 10
    last = slice(rows - 50, rows)
    wanted = expected(hidden[last], weight, bias, labels[last], *rest)
    check([value[last] for value in got], wanted, 1e-3)


def test_the_kernel_runs(monkeypatch):
    called = []
    original = kernels.score_partials_triton
    monkeypatch.setattr(kernels, "score_partials_triton", lambda *a, **k: called.append(1) or original(*a, **k))
    case = make_case(10, 100, 64, dtype=torch.bfloat16, device="cuda")
    score_partials(*case[:3], *case[4:], SPAN)
    assert called


@pytest.fixture
def compiled():
    """``score`` under max-autotune, and its code; Inductor times the choices whose name matches."""
    lowerings.register()
    torch._dynamo.reset()

    def run(case, choices=None):
        options = {"max_autotune_gemm": True, "force_disable_caches": True}
        options["test_configs.autotune_choice_name_regex"] = choices
        with torch._inductor.config.patch(options):
            tensors = [a for a in case if isinstance(a, torch.Tensor)]

            def function(*given):
                left = iter(given)
                return score(*(next(left) if isinstance(a, torch.Tensor) else a for a in case))

            found, (code, *_) = run_and_get_code(torch.compile(function), *tensors)
        return found, code

    return run


CALL = "= torch.ops.cggr.score_partials"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "vocab", "width", "modes"),
    [(300, 5000, 576, dict()), (130, 50257, 100, dict(bias=True, softcap=20.0, scale=0.5))],
)
def test_template_chosen(compiled, rows, vocab, width, modes, dtype):
    case = make_case(rows, vocab, width, dtype=dtype, device="cuda", **modes)
    found, code = compiled(case, "^triton_cggr_score")
    assert "triton_tem" in code and CALL not in code
    check(found, expected(*case), TOLERANCE[dtype])


def test_call_chosen(compiled):
    case = make_case(300, 5000, 576, dtype=torch.bfloat16, device="cuda", bias=True)
    found, code = compiled(case, "^cggr_score")
    assert "triton_tem" not in code and CALL in code
    check(found, expected(*case), 1e-3)


def test_either_chosen(compiled):
    case = make_case(4096, 20000, 576, dtype=torch.bfloat16, device="cuda")
    found, code = compiled(case)
    assert ("triton_tem" in code) != (CALL in code)
    check(found, expected(*case), 1e-3)


def test_every_tile():
    """Of those that the card has the memory for."""
    case = make_case(300, 5000, 576, dtype=torch.bfloat16, device="cuda")
    arguments = (*case[:3], *case[4:], SPAN)
    wanted = score_partials_reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in arguments))
    ran = 0
    errors = pytest.importorskip("triton.runtime.errors")
    for way in head_product.configurations(torch.bfloat16):
        try:
            found = kernels.score_partials_triton(*arguments, **way)
        except errors.OutOfResources:
            continue
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
        ran += 1
    assert ran > 0
