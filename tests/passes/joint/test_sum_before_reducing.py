"""One reduction for a parameter that is read twice."""

from __future__ import annotations

import pytest
import torch
from lockstep import WORLD, count, reduce, run, scatter, traced

from cggr_compile.passes.joint.sum_before_reducing import SumBeforeReducing

EACH = [
    [torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * rank + i)) for i in range(3)] for rank in (0, 1)
]


def cast_down(tensor):
    return torch.ops.prims.convert_element_type.default(tensor, torch.bfloat16)


def check(function, before, after, **tolerance):
    gm = traced(function, *EACH[0])
    want = run(gm, EACH)
    assert count(gm, "reduce_scatter_tensor") + count(gm, "all_reduce") == before
    result = SumBeforeReducing()(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert result.matched == (before != after)
    assert count(gm, "reduce_scatter_tensor") + count(gm, "all_reduce") == after
    assert not SumBeforeReducing()(gm.graph).matched
    for got, expected in zip(run(gm, EACH), want, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)
    return gm


@pytest.mark.parametrize(
    ("function", "before"),
    [
        (lambda a, b, c: [scatter(a) + scatter(b)], 2),
        (lambda a, b, c: [scatter(a) + scatter(b) + scatter(c)], 3),
        (lambda a, b, c: [reduce(a.view(6, 4)) + reduce(b.view(6, 4))], 2),
        (lambda a, b, c: [scatter(a)[:1] + scatter(b)[:1]], 2),
    ],
)
def test_added_before(function, before):
    check(function, before, 1)


def test_added_in_the_dtype_that_is_reduced_in():
    check(lambda a, b, c: [(cast_down(scatter(a)) + cast_down(scatter(b))).float()], 2, 1, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, c: [scatter(a) + scatter(b, "sum")],
        lambda a, b, c: [scatter(a)[:1] + scatter(b)[1:]],
        lambda a, b, c: [scatter(a) * scatter(b)],
        lambda a, b, c: [torch.add(scatter(a), scatter(b), alpha=2)],
        lambda a, b, c: [scatter(a) + reduce(b)[:2]],
    ],
)
def test_left_alone(function):
    check(function, 2, 2)


def test_what_somebody_else_reads_stays():
    def function(a, b, c):
        first = scatter(a)
        return [first + scatter(b), first * 2]

    check(function, 2, 2)


def test_one_value_twice():
    def function(a, b, c):
        first = scatter(a)
        return [first + first]

    check(function, 1, 1)
    assert len(EACH) == WORLD
