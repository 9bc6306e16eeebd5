"""The Triton kernels of ``attention_rows_backward`` on a GPU against float64 autograd; with -s, their times."""

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


def kernel_times(call):
    """Mean microseconds of each CUDA kernel."""
    for _ in range(3):
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(20):
            call()
        torch.cuda.synchronize()
    return {event.key[:40]: event.device_time_total / 20 for event in profile.key_averages() if event.device_time_total}


def test_times(request, monkeypatch):
    """16 x 9 x 2048 x 64 in bfloat16, 25 % of the rows: prints, asserts nothing."""
    if request.config.getoption("capture") != "no":
        pytest.skip("prints times: run with -s")
    batch, heads, length, dim, slots = 16, 9, 2048, 64, 512
    scale = dim**-0.5

    def values():
        return torch.randn(batch, length, heads, dim, dtype=torch.bfloat16, device="cuda").transpose(1, 2)

    query, key, value, grad = values(), values(), values(), values()
    aten = torch.ops.aten
    forward = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scale)
    out, logsumexp, *rest = forward
    cum_q, cum_k, max_q, max_k, seed, offset = rest[:6]

    def flash():
        return aten._scaled_dot_product_flash_attention_backward(
            *(grad, query, key, value, out, logsumexp, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset), scale=scale
        )

    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}: microseconds per kernel")
    times = kernel_times(flash)
    print(f"flash, all rows: {sum(times.values()):7.1f}", {name: round(time, 1) for name, time in times.items()})
    rows = torch.stack([torch.randperm(length)[:slots].sort().values for _ in range(batch)]).cuda()
    index = rows[:, None, :, None].expand(-1, heads, -1, dim)
    picked = [tensor.gather(2, index) for tensor in (grad, query, out)]
    picked_lse = logsumexp.gather(2, rows[:, None].expand(-1, heads, -1))
    options = kernels.block_options(torch.bfloat16, dim)
    candidates = [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 64, 4, 4),
        (64, 64, 8, 3),
        (64, 128, 8, 2),
        (128, 64, 8, 3),
        (32, 64, 4, 3),
    ]
    for all_keys in (False, True):
        for candidate in [tuple(options.values()), *candidates]:
            chosen = dict(zip(options, candidate, strict=True))
            monkeypatch.setattr(kernels, "block_options", lambda dtype, block_d, chosen=chosen: dict(chosen))

            def ours(all_keys=all_keys):
                return kernels.attention_rows_backward_triton(
                    *(picked[0], picked[1], key, value, picked[2], picked_lse, rows, None, scale, True, all_keys)
                )

            times = kernel_times(ours)
            print(
                f"all_keys {all_keys!s:5} M, N, warps, stages {candidate}: {sum(times.values()):7.1f}",
                {name: round(time, 1) for name, time in times.items()},
            )
