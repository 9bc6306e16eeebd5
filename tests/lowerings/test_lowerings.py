"""What Inductor generates for operators that have a lowering (on the CPU; with kernels: tests/gpu)."""

from __future__ import annotations

import pytest
import torch
from ops.test_attention_rows import make_case
from torch._inductor.utils import run_and_get_code

from cggr_compile import compat, lowerings
from cggr_compile.ops.attention_rows import attention_rows_backward, attention_rows_backward_reference
from cggr_compile.ops.concat_in_place import concat_in_place
from cggr_compile.ops.rows import fusion_barrier

pytestmark = pytest.mark.skipif(compat.cpp_compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def _registered():
    lowerings.register()
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def test_joined_columns_are_written_in_place():
    def function(a, b, weight):
        joined = concat_in_place([a.exp(), (b * 2).sin()], 1)
        return joined @ weight, joined[:, 3:]

    a, b, weight = torch.randn(5, 3), torch.randn(5, 4), torch.randn(7, 2)
    got, (code,) = run_and_get_code(torch.compile(function), a, b, weight)
    expected = function(a, b, weight)
    for have, want in zip(got, expected, strict=True):
        torch.testing.assert_close(have, want)
    assert "cggr.concat_in_place" not in code.split("def call(")[1]  # no call of the operator
    assert "aten.cat" not in code.split("def call(")[1]


def test_the_same_part_twice():
    def function(a):
        part = a.cos()
        return concat_in_place([part, part], 1), part.sum()

    a = torch.randn(4, 3)
    for have, want in zip(torch.compile(function)(a), function(a), strict=True):
        torch.testing.assert_close(have, want)


def test_attention_without_a_kernel_is_a_call():
    arguments, _ = make_case(8, 20, 8, all_keys=True)
    compiled = torch.compile(lambda *tensors: attention_rows_backward(*tensors, *arguments[7:]))
    got, (code,) = run_and_get_code(compiled, *arguments[:7])
    assert "cggr.attention_rows_backward" in code
    for have, want in zip(got, attention_rows_backward_reference(*arguments), strict=True):
        torch.testing.assert_close(have, want)


def test_a_fusion_barrier_is_no_copy_and_its_memory_stays():
    def function(a, weight):
        made = a.sin() + 1
        behind = fusion_barrier(made, 3)
        early = made @ weight + behind @ weight  # the last use of made, but for its memory
        late = ((early.cos() @ weight).exp() @ weight).tanh()  # in memory that others left
        return late, behind * 3

    a, weight = torch.randn(6, 6), torch.randn(6, 6)
    got, (code,) = run_and_get_code(torch.compile(function), a, weight)
    for have, want in zip(got, function(a, weight), strict=True):
        torch.testing.assert_close(have, want)
    assert "aten.alias.default(" in code and "cggr.fusion_barrier.default(" not in code
