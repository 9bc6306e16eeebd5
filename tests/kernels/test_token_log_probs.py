"""The kernels of ``token_log_probs`` without a GPU: interpreted for their numbers, compiled for fit."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from ops.test_token_log_probs import NAMES, check, expected, make_case, make_grads  # noqa: E402
from triton_harness import binaries_for, compiled, interpreted, poison_empty_memory  # noqa: E402

import cggr_compile.ops.head_gradients as backward  # noqa: E402
import cggr_compile.ops.token_log_probs as forward  # noqa: E402
from cggr_compile.kernels import head_gradients as gradients  # noqa: E402
from cggr_compile.kernels import moe_products as products  # noqa: E402
from cggr_compile.kernels import moe_weight_gradient as sums  # noqa: E402
from cggr_compile.kernels import token_log_probs as kernels  # noqa: E402

TILE = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, GROUP=2)
MODES = [dict(), dict(bias=True, softcap=2.0, scale=0.3), dict(bias=True, scale=0.5)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What no program writes is NaN."""
    poison_empty_memory(monkeypatch)


class Context:
    """What autograd hands from a forward to its backward."""

    needs_input_grad = (True, True, True, False, True, *(False,) * 7)

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors): ...

    def set_materialize_grads(self, value): ...


def run(case, grads, pack=True, rows=(None, None, None), columns=None, span=32, tile=TILE, **loads):
    """The six values and the gradients of hidden (or its rows), weight and bias, all as on a GPU.

    columns: of the workspace. span: columns of a program. tile: {} for the sizes of a device.
    """
    hidden, weight, bias, labels, *numbers = case
    originals = kernels.token_log_probs_triton, gradients.logit_gradient_triton, gradients.FirstRowsProducts
    sizes = {**tile, **loads, "SPAN": span} if tile else loads
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "token_log_probs_triton", lambda *a: originals[0](*a, **sizes))
        patch.setattr(gradients, "logit_gradient_triton", lambda *a: originals[1](*a, **sizes))
        patch.setattr(gradients, "FirstRowsProducts", lambda count: originals[2](count, **tile))
        patch.setattr(backward, "COLUMNS", columns or weight.shape[0])
        patch.setattr(backward, "WORKSPACE", dict.fromkeys(backward.WORKSPACE, 1))
        patch.setattr(forward, "head_gradients", backward._head_gradients_cuda)
        for module in (forward, backward):
            patch.setattr(module, "runs_kernels", lambda hidden: True)
        inputs = (hidden, weight, bias, labels, *rows, *numbers, True, True, pack)
        values = forward._forward_cuda(*inputs)
        context = Context()
        forward._setup_context(context, inputs, values)
        found = forward._backward(context, *grads, None)
    d_hidden = found[0] if rows[0] is None else found[4]
    return (*values, d_hidden, *(found[1:3] if bias is not None else found[1:2]))


@interpreted
@pytest.mark.parametrize(
    ("rows", "vocab", "width", "span", "descriptors", "modes"),
    [
        (1, 1, 16, 16, False, MODES[0]),
        (33, 64, 16, 32, False, MODES[1]),
        (20, 70, 33, 64, False, MODES[2]),
        (3, 17, 8, 16, True, MODES[1]),
        (33, 50, 20, 32, True, MODES[0]),
    ],
)
@pytest.mark.parametrize("pack", [False, True])
def test_sizes(rows, vocab, width, span, descriptors, modes, pack):
    case = make_case(rows, vocab, width, **modes)
    grads = make_grads(case)
    check(run(case, grads, pack, span=span, DESCRIPTORS=descriptors), expected(case, grads), 1e-4)


@interpreted
@pytest.mark.parametrize("labelled", [0.0, 0.05, 0.5, 1.0])
def test_packing(labelled):
    """Rows without a label are not read, or their NaN would be seen."""
    case = make_case(50, 40, 16, bias=True, labelled=labelled)
    grads = make_grads(case)
    wanted = expected(case, grads)
    unlabelled = (case[3] < 0) | (case[3] >= 40)
    case[0][unlabelled] = torch.nan
    got = run(case, [g.masked_fill(unlabelled, torch.nan) for g in grads])
    check(got, wanted, 1e-4)
    assert not any(value[unlabelled].any() for value in got[:7])


@interpreted
def test_programs_beyond_the_count_do_nothing(monkeypatch):
    case = make_case(64, 64, 16, labelled=1.0)
    case[3][:] = -100
    case[3][::8] = 1  # 8 of 64 rows: one block of 16
    tiles = []

    def counted(original):
        return lambda *a: tiles.append(1) or original(*a)

    for module in (kernels, gradients):
        monkeypatch.setattr(module, "add_product", counted(module.add_product))
    grads = make_grads(case)
    check(run(case, grads), expected(case, grads), 1e-4)
    packed = len(tiles)
    run(case, grads, pack=False)
    assert packed == 2 * 64 // 16 and len(tiles) - packed == 4 * packed

    into = torch.full((64, 64), torch.nan)
    numbers = [torch.ones(64), None, None, torch.ones(64), None]
    count = torch.tensor([5], dtype=torch.int32)
    gradients.logit_gradient_triton(
        *(*case[:4], torch.ones(64), numbers, 1.0, 0.0, count, slice(0, 64), into), **TILE, SPAN=32
    )
    assert into[:5].isfinite().all() and into[5:].isnan().all()


@interpreted
@pytest.mark.parametrize("value", range(5))
def test_each_value_alone(value):
    case = make_case(20, 50, 16, bias=True, softcap=3.0)
    grads = [grad if number == value else None for number, grad in enumerate(make_grads(case))]
    check(run(case, grads), expected(case, grads), 1e-4)


@interpreted
@pytest.mark.parametrize(("columns", "pack"), [(1, False), (32, True), (37, True)])
def test_spans_of_the_workspace(columns, pack):
    case = make_case(20, 70, 16, bias=True)
    grads = make_grads(case)
    check(run(case, grads, pack, columns=columns), expected(case, grads), 1e-4)


@interpreted
def test_rows():
    """Values of all positions, gradients of some."""
    case = hidden, weight, bias, labels, *numbers = make_case(40, 50, 16, bias=True, softcap=3.0)
    rows, weights = torch.randperm(40)[:18], torch.rand(18) + 1.0
    weights[15:] = 0.0
    grads = make_grads(case)
    got = run(case, grads, rows=(hidden[rows], rows, weights))
    at_rows = (hidden[rows], weight, bias, labels[rows], *numbers)
    wanted = expected(at_rows, [grad[rows] * weights for grad in grads])
    check((*got[:6], *got[6:]), (*expected(case, grads)[:6], *wanted[6:]), 1e-4)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype):
    case = make_case(20, 70, 32, dtype=dtype, bias=True, softcap=3.0)
    grads = make_grads(case)
    got, wanted = run(case, grads), expected(case, grads)
    assert [t.dtype for t in got] == [torch.float32] * 6 + [dtype] * 3
    check(got[:6], wanted[:6], 1e-3)
    check(got[6:], wanted[6:], 2e-2, NAMES[6:])


@interpreted
@pytest.mark.parametrize("pack", [False, True])
def test_strides(pack):
    case = hidden, weight, bias, labels, *numbers = make_case(20, 40, 16, bias=True)
    grads = make_grads(case)
    views = (
        torch.stack([hidden, hidden], -1)[..., 0],
        weight.t().contiguous().t(),
        torch.stack([bias, bias], -1)[..., 0],
        torch.stack([labels, labels], -1)[..., 1],
        *numbers,
    )
    check(run(views, grads, pack), expected(case, grads), 1e-4)


@interpreted
def test_ties_and_large_logits():
    case = make_case(6, 100, 16)
    case = (case[0] * 100.0, *case[1:])
    grads = make_grads(case)
    check(run(case, grads), expected(case, grads), 1e-3)
    weight = torch.zeros(50, 16)
    weight[3] = weight[40] = 1.0  # in two spans
    case = (torch.ones(4, 16), weight, None, torch.tensor([3, 40, 5, -100]), 1.0, 0.0)
    assert run(case, make_grads(case))[5].tolist() == [1.0, 1.0, 0.0, 0.0]


@interpreted
@pytest.mark.parametrize("pack", [False, True])
def test_tiles_of_a_device(pack):
    case = make_case(20, 1100, 32)
    grads = make_grads(case)
    check(run(case, grads, pack, columns=1024, tile={}), expected(case, grads), 1e-4)


@interpreted
def test_no_rows():
    case = make_case(0, 20, 16, bias=True)
    got = run(case, make_grads(case))
    assert [tuple(t.shape) for t in got] == [(0,)] * 6 + [(0, 16), (20, 16), (20,)] and not got[7].any()


@interpreted
def test_the_comparison_can_fail():
    case = make_case(20, 64, 16)
    grads = make_grads(case)
    with pytest.raises(AssertionError):
        check(run((*case[:3], case[3].roll(1), *case[4:]), grads), expected(case, grads), 1e-4)
    with pytest.raises(AssertionError):
        check(run(case, grads)[6:], expected(case, [2 * grads[0], *grads[1:]])[6:], 1e-4, NAMES[6:])


ALL = [(kernels, "_partials_kernel"), (kernels, "_merge_kernel"), (gradients, "_logit_gradient_kernel")]
OF_ROWS = [
    *((products, "_schedule_kernel"), (products, "_rows_kernel")),
    *((sums, "_weight_gradient_kernel"), (sums, "_streamed_weight_gradient_kernel")),
]


@compiled
@pytest.mark.parametrize(
    ("arch", "vocab", "width", "pack", "modes"),
    [
        (80, 49152, 576, True, dict(dtype=torch.bfloat16)),
        (90, 49152, 576, True, dict(dtype=torch.bfloat16)),
        (100, 49152, 576, True, dict(dtype=torch.bfloat16)),
        (90, 50257, 100, False, dict(dtype=torch.float16, bias=True, softcap=30.0)),
        (90, 49152, 576, False, dict(dtype=torch.float32)),
    ],
)
def test_compiles_without_a_gpu(monkeypatch, tmp_path, arch, vocab, width, pack, modes):
    dtype = modes["dtype"]
    descriptors = arch >= 90 and dtype == torch.bfloat16
    hidden, weight, bias, labels, scale, softcap = make_case(256, vocab, width, **modes)
    values, part, into = torch.randn(256), slice(8192, 16384), hidden.new_empty(256, 8192)
    count = torch.tensor([100], dtype=torch.int32)
    for module in (products, sums):
        monkeypatch.setattr(module, "has_descriptors", lambda tensor: descriptors)

    def call():
        packing = (torch.arange(256), count) if pack else None
        kernels.token_log_probs_triton(
            *(hidden, weight, bias, labels, packing, scale, softcap, True, True, [values] * 6), DESCRIPTORS=descriptors
        )
        gradients.logit_gradient_triton(
            *(hidden, weight, bias, labels, values, [values] * 5, scale, softcap, count if pack else None, part, into),
            DESCRIPTORS=descriptors,
        )
        if pack:
            skipping = gradients.FirstRowsProducts(count)
            skipping.add(torch.zeros(256, width), into, weight[part])
            skipping.outer(into, hidden, weight[part].clone())

    found = binaries_for(monkeypatch, tmp_path, arch, ALL + OF_ROWS, call)
    assert len(found) == (6 if pack else 3)
    for kernel in found:
        assert kernel.asm["cubin"].startswith(b"\x7fELF")
        assert f".target sm_{arch}" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= (166912 if arch == 80 else 232448)
        multiplies = kernel.metadata.name not in ("_schedule_kernel", "_merge_kernel")
        assert ("mma" in kernel.asm["ptx"]) == (multiplies and dtype != torch.float32)
