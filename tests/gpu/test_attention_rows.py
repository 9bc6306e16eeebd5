"""The Triton kernels of ``attention_rows_backward`` on a GPU against float64 autograd."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ops.test_attention_rows import errors, make_case, poisoned

from cggr_compile.kernels import attention_rows as kernels
from cggr_compile.ops.attention_rows import attention_rows_backward_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)


def check(dtype, slots, length, dim, **modes):
    for _ in range(2):  # two draws: the second meets what the first left behind
        arguments, expected = make_case(slots, length, dim, dtype=dtype, device="cuda", **modes)
        with poisoned("cuda"):
            got = kernels.attention_rows_backward_triton(*arguments)
        found = errors(got, expected)
        print(f"{dtype} {slots} of {length}, d {dim}, {modes}: dq, dk, dv", *(f"{error:.1e}" for error in found))
        assert max(found) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("all_keys", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(9, 64), (4, 128)])
def test_plain(heads, dim, causal, all_keys, dtype):
    check(dtype, 128, 512, dim, heads=heads, causal=causal, all_keys=all_keys, unused=10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("all_keys", [False, True])
@pytest.mark.parametrize("mask", ["bool", "additive"])
def test_masks(mask, all_keys, dtype):
    check(dtype, 77, 301, 64, mask=mask, all_keys=all_keys)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("all_keys", [False, True])
@pytest.mark.parametrize("mask", [None, "bool"])
def test_soft_cap(mask, all_keys, dtype):
    check(dtype, 128, 512, 128, heads=4, kv_heads=2, mask=mask, all_keys=all_keys, softcap=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("slots", "length", "dim"), [(1, 1, 8), (1, 70, 16), (65, 65, 80), (50, 333, 256), (1100, 1200, 32)]
)
def test_sizes(slots, length, dim, dtype):
    for all_keys in (False, True):
        check(dtype, slots, length, dim, all_keys=all_keys)


@pytest.mark.parametrize("dtype", DTYPES)
def test_key_heads_are_shared(dtype):
    for all_keys in (False, True):
        check(dtype, 128, 512, 64, heads=9, kv_heads=3, all_keys=all_keys)


def test_fully_masked_queries_of_float_minimum():
    """A finite mask as large as it gets: no NaN from the change of base, and the same numbers as the reference."""
    arguments, _ = make_case(20, 50, 16, mask="additive", device="cuda")
    lowest = torch.finfo(torch.float32).min
    arguments = (
        *(*arguments[:5], arguments[5].clamp(min=lowest), arguments[6]),
        *(arguments[7].clamp(min=lowest), *arguments[8:]),
    )
    got = kernels.attention_rows_backward_triton(*arguments)
    assert max(errors(got, attention_rows_backward_reference(*arguments))) < 1e-4  # cuBLAS sums in another order


@pytest.mark.parametrize("all_keys", [False, True])
def test_offsets_beyond_32_bits(all_keys):
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    arguments, expected = make_case(
        4000, 4000, 64, all_keys=all_keys, batch=1, heads=1, dtype=torch.bfloat16, device="cuda"
    )
    stride = 600_000
    assert 4000 * stride > 2**31
    buffer = torch.empty(4000 * stride, dtype=torch.bfloat16, device="cuda")
    wide = []
    for index, tensor in enumerate(arguments[:5]):
        wide.append(buffer[64 * index :].as_strided(tensor.shape, (0, 0, stride, 1)))
        wide[-1].copy_(tensor)
    got = kernels.attention_rows_backward_triton(*wide, *arguments[5:])
    assert max(errors(got, expected)) < 1e-2


def test_the_comparison_can_fail():
    arguments, expected = make_case(128, 512, 64, all_keys=True, device="cuda")
    for wrong in ((*arguments[:9], False, True), (*arguments[:6], arguments[6].flip(0), *arguments[7:])):
        assert max(errors(kernels.attention_rows_backward_triton(*wrong), expected)) > 1e-2
