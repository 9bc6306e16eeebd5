"""Angles in buffers of their own: which values get one, and that nothing else changes."""

from __future__ import annotations

import merging
import pytest
import torch

import cggr_compile.ops  # noqa: F401
from cggr_compile.passes.joint.materialize_rotary_tables import MIN_READERS, MaterializeRotaryTables


def arguments(layers):
    generator = torch.Generator().manual_seed(0)
    queries = [torch.randn(2, 3, 5, 4, generator=generator) for _ in range(layers)]
    return queries, torch.rand(2, generator=generator), torch.arange(5)


def rotate(queries, frequencies, positions):
    angles = positions[:, None].float() * frequencies
    both = torch.cat([angles, angles], -1)
    cos, sin = both.cos(), both.sin()
    results = []
    for query in queries:
        turned = torch.cat([-query[..., 2:], query[..., :2]], -1)
        results.append(query * cos[None, None] + turned * sin[None, None])
    return results


def barriers(graph):
    return graph.find_nodes(op="call_function", target=torch.ops.cggr.fusion_barrier.default)


def check(function, inputs, expected):
    gm = merging.traced(function, *inputs)
    result = MaterializeRotaryTables()(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert len(barriers(gm.graph)) == expected and result.matched == bool(expected), result.reason
    for want, have in zip(function(*inputs), gm(*inputs), strict=True):
        assert torch.equal(want, have)
    assert not MaterializeRotaryTables()(gm.graph).matched  # twice is once
    return gm


@pytest.mark.parametrize(("layers", "expected"), [(MIN_READERS, 2), (MIN_READERS - 1, 0)])
def test_rotary_embeddings_of_many_layers(layers, expected):
    gm = check(rotate, arguments(layers), expected)
    for barrier in barriers(gm.graph):
        assert len(barrier.args[0].users) == 1  # every layer reads the copy


def test_what_depends_on_an_activation_is_left_alone():
    def function(queries, frequencies, positions):
        cos = queries[0][0, 0].cos()
        return [query * cos for query in queries]

    check(function, arguments(MIN_READERS), 0)


def test_positions_without_angles_are_left_alone():
    def function(queries, frequencies, positions):
        distance = positions[:, None].float() * frequencies.repeat(2)
        return [query * distance for query in queries]

    check(function, arguments(MIN_READERS), 0)


def test_angles_for_one_reader_are_left_alone():
    def function(queries, frequencies, positions):
        cos = (positions[:, None].float() * frequencies.repeat(2)).cos()
        return [queries[0] * (cos + cos * cos).exp()]

    check(function, arguments(1), 0)


def test_random_numbers_are_no_positions():
    def function(queries, frequencies, positions):
        noise = torch.bernoulli(torch.zeros_like(positions[:, None].float()) + 0.0).cos()
        return [query * noise for query in queries]

    check(function, arguments(MIN_READERS), 0)


def test_rows_of_angles():
    def function(queries, frequencies, positions):
        rows = queries[0].sum((0, 1, 3)).argsort()[:3]  # selected by what the model computed
        cos = (positions[:, None].float() * frequencies.repeat(2)).cos()
        cos = cos[rows]
        return [query[:, :, rows] * cos for query in queries]

    gm = check(function, arguments(MIN_READERS), 1)
    (barrier,) = barriers(gm.graph)
    assert tuple(barrier.meta["val"].shape) == (3, 4)
