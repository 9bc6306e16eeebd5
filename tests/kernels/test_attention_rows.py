"""The Triton kernels of ``attention_rows_backward`` without a GPU: interpreted for their numbers, compiled for fit."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from ops.test_attention_rows import errors, make_case, poisoned  # noqa: E402
from triton_harness import binaries_for, compiled, interpreted  # noqa: E402

from cggr_compile.kernels import attention_gradients as gradients  # noqa: E402
from cggr_compile.kernels import attention_rows as kernels  # noqa: E402
from cggr_compile.ops.attention_rows import attention_rows_backward_reference  # noqa: E402


def check(arguments, expected, tolerance):
    with poisoned():
        got = kernels.attention_rows_backward_triton(*arguments)
    reference = attention_rows_backward_reference(*arguments)
    assert [(g.shape, g.dtype, g.stride()) for g in got] == [(r.shape, r.dtype, r.stride()) for r in reference]
    assert max(errors(got, expected)) < tolerance
    assert max(errors(got, reference)) < tolerance


@interpreted
@pytest.mark.parametrize("all_keys", [False, True])
@pytest.mark.parametrize(
    ("causal", "mask"),
    [
        (True, None),
        (False, "bool"),
        (True, "additive"),
        *(pytest.param(*mode, marks=pytest.mark.slow) for mode in ((False, None), (True, "bool"), (False, "additive"))),
    ],
)
def test_every_mode(causal, mask, all_keys):
    modes = dict(causal=causal, mask=mask, all_keys=all_keys)
    check(*make_case(70, 130, 16, unused=9, **modes), 1e-5)
    check(*make_case(33, 64, 8, batch=1, unused=3, dtype=torch.float16, **modes), 1e-2)
    check(*make_case(1, 7, 8, **modes), 1e-5)


@interpreted
@pytest.mark.parametrize("all_keys", [False, True])
@pytest.mark.parametrize("mask", [None, pytest.param("bool", marks=pytest.mark.slow), "additive"])
def test_soft_cap(mask, all_keys):
    modes = dict(mask=mask, all_keys=all_keys, softcap=0.7)
    check(*make_case(40, 100, 16, unused=5, **modes), 1e-5)
    check(*make_case(33, 64, 8, batch=1, causal=False, dtype=torch.float16, **modes), 1e-2)


@interpreted
@pytest.mark.parametrize("all_keys", [False, True])
@pytest.mark.parametrize(
    ("slots", "length", "dim", "dtype"),
    [
        (1, 1, 8, torch.float32),
        (1, 97, 16, torch.float32),
        (65, 65, 16, torch.float32),
        (128, 128, 64, torch.float16),
        (40, 200, 80, torch.float32),
        (40, 90, 200, torch.float16),
        (7, 1100, 16, torch.float32),
    ],
)
def test_sizes(slots, length, dim, dtype, all_keys):
    arguments, expected = make_case(slots, length, dim, all_keys=all_keys, heads=1, batch=1, dtype=dtype)
    check(arguments, expected, 1e-5 if dtype == torch.float32 else 1e-2)


@interpreted
@pytest.mark.parametrize("all_keys", [False, True])
def test_more_rows_than_are_scanned_together(monkeypatch, all_keys):
    monkeypatch.setattr(gradients, "SCAN", triton.language.constexpr(32))
    check(*make_case(70, 130, 16, all_keys=all_keys, heads=1, batch=1), 1e-5)


@interpreted
def test_bfloat16_is_upcast():
    check(*make_case(20, 50, 16, dtype=torch.bfloat16), 1e-2)


@interpreted
@pytest.mark.parametrize("all_keys", [False, True])
def test_key_heads_are_shared(all_keys):
    for mask in (None, "bool", "additive"):
        check(*make_case(40, 100, 16, batch=1, heads=6, kv_heads=2, all_keys=all_keys, mask=mask), 1e-5)


@interpreted
@pytest.mark.parametrize("dim", [32, 48, 80, 96, 128, 256])
def test_sizes_of_heads(dim):
    for all_keys in (False, True):
        check(*make_case(20, 40, dim, all_keys=all_keys, batch=1), 1e-5)


@interpreted
def test_strides():
    arguments, expected = make_case(40, 100, 16, heads=3)
    grad, query, key, value, out, logsumexp, rows, *rest = arguments
    fused = torch.cat([key, value], -1)  # slices of one projection
    key, value = fused[..., :16], fused[..., 16:]
    query = torch.stack([query, query], -1)[..., 0]  # last stride 2
    logsumexp = logsumexp.mT.contiguous().mT
    rows = torch.stack([rows, rows], -1)[..., 1]
    check((grad, query, key, value, out, logsumexp, rows, *rest), expected, 1e-5)
    grad = torch.ones(()).expand(grad.shape)  # the gradient of a sum: all strides 0
    arguments = (grad, query, key, value, out, logsumexp, rows, *rest)
    check(arguments, attention_rows_backward_reference(*arguments), 1e-5)


@interpreted
@pytest.mark.parametrize("all_keys", [False, True])
def test_rows_in_any_order(all_keys):
    """The bounds of the walks come from the positions, so an unsorted tail (here: all of it) loses nothing."""
    arguments, _ = make_case(140, 300, 16, batch=1, heads=1, unused=140, all_keys=all_keys)
    grad = torch.randn_like(arguments[0])
    arguments = (grad, *arguments[1:])
    check(arguments, attention_rows_backward_reference(*arguments), 1e-5)


@interpreted
@pytest.mark.parametrize(
    ("rows", "tiles"),
    [
        ([*range(32, 64), *range(128, 160)], 2 + 5),  # two blocks: the keys up to the end of each
        (range(3, 256, 4), 4 + 8),  # as many, scattered
    ],
    ids=["spans", "scattered"],
)
def test_tiles_behind_the_last_row_are_left_out(rows, tiles, monkeypatch):
    """Tiles of 32 queries and 32 keys, 3 products each for dq and 4 for dk and dv."""
    from triton.runtime.interpreter import InterpreterBuilder

    products = []
    multiply = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda *args, **kwargs: products.append(1) or multiply(*args, **kwargs)
    )
    arguments, _ = make_case(64, 256, 16, batch=1, heads=1, all_keys=True)
    grad, query, key, value, out, logsumexp, _, *rest = arguments
    rows = torch.tensor([list(rows)])
    kernels.attention_rows_backward_triton(grad, query, key, value, out, logsumexp, rows, *rest)
    assert len(products) == (3 + 4) * tiles


@interpreted
def test_logsumexp_of_fully_masked_queries():
    arguments, _ = make_case(20, 50, 16, mask="bool")
    logsumexp, blind = arguments[5], ~arguments[7].any(-1).expand(-1, 2, -1)
    assert blind.any() and (logsumexp[blind] == -torch.inf).all()
    for value in (-torch.inf, torch.inf, torch.nan):
        replaced = (*arguments[:5], logsumexp.masked_fill(blind, value), *arguments[6:])
        check(replaced, attention_rows_backward_reference(*replaced), 1e-5)


@interpreted
def test_finite_mask_values_as_large_as_they_get():
    arguments, _ = make_case(20, 50, 16, mask="additive")
    mask = arguments[7].clamp(min=torch.finfo(torch.float32).min)
    logsumexp = arguments[5].clamp(min=torch.finfo(torch.float32).min)
    arguments = (*arguments[:5], logsumexp, arguments[6], mask, *arguments[8:])
    check(arguments, attention_rows_backward_reference(*arguments), 1e-5)


@interpreted
def test_the_comparison_can_fail():
    arguments, expected = make_case(40, 100, 16, all_keys=True)
    for wrong in ((*arguments[:9], False, True), (*arguments[:6], arguments[6].flip(0), *arguments[7:])):
        assert max(errors(kernels.attention_rows_backward_triton(*wrong), expected)) > 1e-2


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Calls the public function with kernels that are compiled for a device that is not there, and not launched."""

    def call(arch, *arguments):
        launch = lambda: kernels.attention_rows_backward_triton(*arguments)  # noqa: E731
        both = [(kernels, "dq_kernel"), (kernels, "dkv_kernel")]
        return binaries_for(monkeypatch, tmp_path, arch, both, launch)

    return call


@compiled
@pytest.mark.parametrize(("arch", "shared_memory"), [(100, 232448), (90, 232448), (80, 166912)])
@pytest.mark.parametrize(
    ("slots", "dim", "dtype", "modes"),
    [
        pytest.param(64, 64, torch.bfloat16, dict(), marks=pytest.mark.slow),
        pytest.param(64, 128, torch.bfloat16, dict(all_keys=True), marks=pytest.mark.slow),
        (40, 256, torch.bfloat16, dict(causal=False, mask="additive")),
        (1, 80, torch.float16, dict(all_keys=True, mask="bool", kv_heads=1)),  # 1 is special in Triton's signatures
        (40, 64, torch.float32, dict(mask="bool")),
        (64, 128, torch.bfloat16, dict(softcap=50.0)),
    ],
)
def test_compiles_without_a_gpu(build, arch, shared_memory, slots, dim, dtype, modes):
    arguments, _ = make_case(slots, 100, dim, dtype=dtype, **modes)
    binaries = build(arch, *arguments)
    assert [kernel.metadata.name for kernel in binaries] == ["dq_kernel", "dkv_kernel"]
    for kernel in binaries:
        assert kernel.asm["cubin"].startswith(b"\x7fELF")
        assert f".target sm_{arch}" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= shared_memory
        assert ("mma" in kernel.asm["ptx"]) == (dtype != torch.float32)  # tensor cores, but ieee products in float32


@compiled
def test_refuses_what_it_cannot_do():
    (grad, query, key, value, *rest), _ = make_case(4, 9, 8, heads=3)
    for wrong in (
        (grad, query, key[:, :2], value[:, :2]),  # 3 heads over 2
        (grad, query, key, value[..., :4]),
        (grad.double(), query.double(), key.double(), value.double()),
        (grad, query.half(), key, value),
    ):
        with pytest.raises(ValueError):
            kernels.attention_rows_backward_triton(*wrong, *rest)


@compiled
def test_no_slots():
    for all_keys in (False, True):
        arguments, _ = make_case(0, 9, 8, all_keys=all_keys)
        got = kernels.attention_rows_backward_triton(*arguments)
        reference = attention_rows_backward_reference(*arguments)
        assert all(torch.equal(g, r) for g, r in zip(got, reference, strict=True))
