"""Merged sums over rows of the backward pass: the same numbers from fewer sums."""

from __future__ import annotations

import functools

import merging
import pytest
import torch
from torch._inductor.utils import run_and_get_code

from cggr_compile import compat, lowerings
from cggr_compile.passes.joint import merge_sums
from cggr_compile.passes.joint.merge_sums import MergeSums

B, K, N = 2, 3, 5
BYTES = B * K * N * 8  # of the terms of one sum


def grads(count, shape=(B, K, N), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


check = functools.partial(merging.check, MergeSums(), torch.ops.aten.sum.dim_IntList)


def norms(tangents, hidden):
    """The weight gradient of a norm and its input gradient, again and again, each from the last one's."""
    found = []
    for x in hidden:
        found.append((tangents * x).sum([0, 1], keepdim=True).view(N))
        tangents = tangents * x.sin()
    return *found, tangents


def test_sums_of_layers_one_after_the_other():
    (tangents, *hidden) = grads(5)
    gm, result = check(norms, tangents, hidden, before=4, after=1)
    assert result.reason == "4 sums over rows, as 1"
    materialize = torch.ops.cggr.materialize.default
    terms = {node.args[0] for node in gm.graph.find_nodes(op="call_function", target=materialize)}
    assert len(terms) == 4 and all(part.next.target is materialize for part in terms)


def test_groups_fit_the_room(monkeypatch):
    monkeypatch.setattr(merge_sums, "MAX_BUFFERED_BYTES", 4 * BYTES)
    (tangents, *hidden) = grads(11)
    assert check(norms, tangents, hidden, before=10, after=3)[1].reason == "10 sums over rows, as 3"
    (tangents, *hidden) = grads(6)
    assert check(norms, tangents, hidden, before=5, after=2)[1].reason == "4 sums over rows, as 1"  # one left over
    monkeypatch.setattr(merge_sums, "MAX_BUFFERED_BYTES", 4 * BYTES - 1)
    assert not check(norms, tangents, hidden, before=5, after=5)[1].matched


def test_a_cast_is_one_for_all():
    convert = torch.ops.prims.convert_element_type.default

    def cast(tangents, hidden):
        return [convert((tangents * x).sum([0, 1]), torch.float32) for x in hidden]

    (tangents, *hidden) = grads(4, dtype=torch.bfloat16)
    gm, _ = check(cast, tangents, hidden, before=3, after=1, tolerance=0)
    assert len(gm.graph.find_nodes(op="call_function", target=convert)) == 1


def forward_only(a, b, c):
    return (a * a).sum([0, 1]), (b * b).sum([0, 1]), (c * c).sum([0, 1])


def of_some_axes(tangents, a, b):
    return (tangents * a).sum([0]), (tangents * b).sum([0])


def of_the_last_axis(tangents, a, b):
    return (tangents * a).sum([2]), (tangents * b).sum([2])


def scaled(tangents, a, b):
    return (tangents * a).sum([0, 1]) * 2, (tangents * b).sum([0, 1]) * 2


def read_again(tangents, a, b):
    first = (tangents * a).sum([0, 1])
    second = (tangents * first).sum([0, 1])
    return first, second, (tangents * b * second).sum([0, 1]).cos()


def of_other_shapes(tangents, a, b):
    return (tangents * a).sum([0, 1]), (tangents * b)[:1].sum([0, 1])


def of_other_types(tangents, a, b):
    return (tangents * a).sum([0, 1]), (tangents * b).float().sum([0, 1])


def in_another_type(tangents, a, b):
    return (tangents * a).sum([0, 1], dtype=torch.float32), (tangents * b).sum([0, 1], dtype=torch.float32)


def of_everything(tangents, a, b):
    return (tangents * a).sum([0, 1, 2]), (tangents * b).sum([0, 1, 2])


def counted(tangents, a, b):
    return (tangents > a).sum([0, 1]), (tangents > b).sum([0, 1])


def of_arguments(tangents_1, tangents_2, tangents_3):
    return tangents_1.sum([0, 1]), tangents_2.sum([0, 1]), tangents_3.sum([0, 1])


@pytest.mark.parametrize(
    ("function", "count"),
    [
        *((forward_only, 3), (of_some_axes, 2), (of_the_last_axis, 2), (scaled, 2), (read_again, 3)),
        *((of_other_shapes, 2), (of_other_types, 2), (in_another_type, 2), (of_everything, 2), (counted, 2)),
        (of_arguments, 3),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_sums_that_stay(function, count):
    check(function, *grads(3), before=count, after=count)
    check(lambda tangents, a, b: [(tangents * x).sum([0, 1]) for x in (a, b)], *grads(3), before=2, after=1)  # control


def test_devices_are_kept_apart():
    def backward(tangents_1, tangents_2, a, b):
        return [(t * x).sum([0, 1]) for t in (tangents_1, tangents_2) for x in (a.to(t.device), b.to(t.device))]

    here, a, b = grads(3)
    gm = merging.traced(backward, here, here.to("meta"), a, b)
    assert MergeSums()(gm.graph).reason == "4 sums over rows, as 2"


def test_one_tensor_summed_twice():
    def twice(tangents, a):
        product = tangents * a
        return product.sum([0, 1]), product.sum([0, 1], keepdim=True), product

    check(twice, *grads(2), before=2, after=1)


@pytest.mark.skipif(compat.cpp_compiler() is None, reason="needs a C++ compiler")
def test_terms_are_written_where_they_are_summed():
    """The generated code has no operator call and copies nothing: a kernel of each layer writes its terms."""
    lowerings.register()
    torch._dynamo.reset()
    (tangents, *hidden) = grads(5, dtype=torch.float32)
    gm, _ = check(norms, tangents, hidden, before=4, after=1)
    with torch._inductor.config.patch(force_disable_caches=True):
        got, (code,) = run_and_get_code(torch.compile(gm), tangents, hidden)
    for have, want in zip(got, norms(tangents, hidden), strict=True):
        torch.testing.assert_close(have, want)
    calls = code.split("def call(")[1]
    assert "torch.ops.cggr" not in calls and "aten.cat" not in calls and "copy" not in calls


def test_the_check_can_fail(monkeypatch):
    monkeypatch.setattr(merge_sums, "backward_of", lambda graph: set())
    (tangents, *hidden) = grads(3)
    with pytest.raises(AssertionError, match="no small sums"):
        check(norms, tangents, hidden, before=2, after=1)
