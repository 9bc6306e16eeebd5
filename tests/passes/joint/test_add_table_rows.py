"""The gradient of few rows of a table: the same numbers without a table of their own."""

from __future__ import annotations

import merging
import pytest
import torch
from torch._inductor.utils import run_and_get_code

from cggr_compile.passes.joint.add_table_rows import AddTableRows

aten = torch.ops.aten
V, H, B, K = 40, 3, 2, 5
put = aten._unsafe_masked_index_put_accumulate.default
cast = torch.ops.prims.convert_element_type.default


def operands(dtype, index=None, unused=()):
    """A table's other gradient, which rows count, their places in the table, and their values in float32."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(V, H, generator=generator).to(dtype)
    index = torch.tensor([[3, 7, 3, 3, 0], [39, 7, 0, 21, 3]]) if index is None else index
    mask = torch.ones(B, K, 1, dtype=torch.bool)
    for place in unused:
        mask[place] = False
    return table, mask, index, torch.randn(B, K, H, generator=generator)


def lookup(mask, index, values, dtype):
    zeros = torch.full((V, H), 0.0)
    written = aten.index_put(zeros, [index], values, True) if mask is None else put(zeros, mask, [index], values)
    return written if dtype == torch.float32 else cast(written, dtype)


def tied(table, mask, index, values):
    return (table + lookup(mask, index, values, table.dtype),)


def untied(table, mask, index, values):
    return (lookup(mask, index, values, table.dtype),)


def exact(table, mask, index, values):
    """The sum in float64."""
    total = table.double().clone()
    for place in (torch.ones(B, K) if mask is None else mask[..., 0]).nonzero().tolist():
        total[index[tuple(place)]] += values[tuple(place)].double()
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_added_to_the_other_gradient(dtype):
    arguments = operands(dtype)
    operator = aten.add.Tensor if dtype == torch.float32 else put
    gm, result = merging.check(AddTableRows(), operator, tied, *arguments, before=1, after=0, tolerance=1e-2)
    assert result.reason == "few rows of 1 tables, 1 of them added to another gradient"
    have, want = gm(*arguments)[0].double(), exact(*arguments)
    rounding = torch.finfo(dtype).eps / 2
    assert ((have - want).abs() <= want.abs() * rounding * 1.01 + 1e-6).all()  # rounded once


def test_as_former_releases_write_it():
    table, _, *rest = operands(torch.bfloat16)
    gm = merging.traced(lambda *arguments: tied(arguments[0], None, *arguments[1:]), table, *rest)
    assert AddTableRows()(gm.graph).matched and not AddTableRows()(gm.graph).matched
    gm.recompile()
    want = exact(table, None, *rest)
    assert ((gm(table, *rest)[0].double() - want).abs() <= want.abs() * 2**-8 + 1e-6).all()


def test_no_table_of_zeros_in_float32():
    gm = merging.traced(tied, *operands(torch.bfloat16))
    assert [n for n in gm.graph.nodes if n.target is put and n.meta["val"].shape == (V, H)]
    assert AddTableRows()(gm.graph).matched
    whole = [n for n in gm.graph.nodes if "val" in n.meta and n.meta["val"].shape == (V, H)]
    assert {n.meta["val"].dtype for n in whole} == {torch.bfloat16}


def test_without_another_gradient():
    arguments = operands(torch.bfloat16)
    gm = merging.traced(untied, *arguments)
    result = AddTableRows()(gm.graph)
    assert result.reason == "few rows of 1 tables, 0 of them added to another gradient"
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(*arguments)[0], untied(*arguments)[0], rtol=0, atol=0)
    assert not AddTableRows()(merging.traced(untied, *operands(torch.float32)).graph).matched  # nothing to spare


def test_rows_that_do_not_count():
    """Padding may name any row, even one past the table's end."""
    index = torch.tensor([[3, 7, 3, V + 9, 0], [39, -1, 0, 21, 3]])
    arguments = operands(torch.bfloat16, index, unused=[(0, 3), (1, 1), (0, 0)])
    gm = merging.traced(tied, *arguments)
    assert AddTableRows()(gm.graph).matched
    gm.recompile()
    have, want = gm(*arguments)[0].double(), exact(*arguments)
    assert ((have - want).abs() <= want.abs() * 2**-8 + 1e-6).all()


def larger(table, mask, index, values):
    """As many rows as the table has."""
    return (table[:10] + cast(put(torch.full((10, H), 0.0), mask, [index % 10], values), table.dtype),)


def read_twice(table, mask, index, values):
    rows = lookup(mask, index, values, table.dtype)
    return table + rows, rows


def in_two_dtypes(table, mask, index, values):
    return (table.double() + lookup(mask, index, values, table.dtype),)


def test_what_does_not_match():
    assert not AddTableRows()(merging.traced(larger, *operands(torch.bfloat16)).graph).matched
    for function in (read_twice, in_two_dtypes):  # the rows get a table, but no wide one
        arguments = operands(torch.bfloat16)
        gm = merging.traced(function, *arguments)
        assert "0 of them added" in AddTableRows()(gm.graph).reason
        gm.recompile()
        for have, want in zip(gm(*arguments), function(*arguments), strict=True):
            torch.testing.assert_close(have, want, rtol=0, atol=0)


def test_compiled_rows_are_read_before_they_are_written():
    """Many rows of one token: one kernel that read and wrote the table would add some of them twice."""
    index = torch.zeros(B, K, dtype=torch.int64)
    arguments = operands(torch.bfloat16, index)
    gm = merging.traced(lambda table, *rest: tied(table * 2, *rest), *arguments)
    assert AddTableRows()(gm.graph).matched
    gm.recompile()
    (have,), code = run_and_get_code(torch.compile(gm), *arguments)
    want = exact(arguments[0] * 2, *arguments[1:])
    assert ((have.double() - want).abs() <= want.abs() * 2**-8 + 1e-6).all()
    assert f"empty_strided_cpu(({V}, {H}), ({H}, 1), torch.float32)" not in code[0]
    assert code[0].count(f"empty_strided_cpu(({V}, {H}), ({H}, 1), torch.bfloat16)") == 1  # in place
