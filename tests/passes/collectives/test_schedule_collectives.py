"""Collectives are merged and moved; what every process computes stays the same."""

from __future__ import annotations

import pytest
import torch
from lockstep import WORLD, count, gather, names, reduce, run, scatter, traced

from cggr_compile.passes.collectives import merge, move, schedule_collectives

aten = torch.ops.aten
SMALL = 8 * 4 * 4  # bytes of a full [8, 4]; a full [16, 8] is larger


def forward(x, norm, table, wide, half, bias):
    """[2, 8], and shards of [8], [8, 4], [16, 8], [8, 4] in 16 bits, [4]."""
    hidden = (x * gather(norm)) @ gather(wide).t()
    return hidden @ torch.cat([gather(table), gather(half).float()]) + gather(bias)


def backward(x, norm, table, wide, half, bias):
    grads = [x[0] * 2, x.t() @ x[:, :4], torch.cat([x.t(), -x.t()]) @ x, (x.t() @ x[:, 4:]).half(), x[1, :4]]
    kinds = [scatter, scatter, scatter, lambda grad: scatter(grad).float(), reduce]
    return [kind(grad) for kind, grad in zip(kinds, grads, strict=True)]


def inputs(rank):
    generator = torch.Generator().manual_seed(rank)
    shapes = [(2, 8), (4,), (4, 4), (8, 8), (4, 4), (2,)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[4] = tensors[4].half()
    return tensors


EACH = [inputs(rank) for rank in range(WORLD)]


def same(got, want):
    for mine, theirs in zip(got, want, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.fixture(autouse=True)
def few_bytes(monkeypatch):
    monkeypatch.setattr(merge, "SMALL", SMALL)


@pytest.mark.parametrize("function", [lambda *a: [forward(*a)], backward])
def test_values_stay(function):
    gm = traced(function, *EACH[0])
    want = run(gm, EACH)
    schedule_collectives(gm.graph)
    gm.recompile()
    same(run(gm, EACH), want)
    once = [str(node) for node in gm.graph.nodes]
    schedule_collectives(gm.graph)
    assert [str(node) for node in gm.graph.nodes] == once


def test_these_values_tell_processes_apart():
    gm = traced(backward, *EACH[0])
    first, second = run(gm, EACH)
    assert not any(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


def test_small_ones_of_a_kind_are_merged():
    gm = traced(lambda *a: [forward(*a)], *EACH[0])
    merge.merge_gathers(gm.graph)
    assert count(gm, "all_gather_into_tensor") == 3  # norm, table and bias; wide; half
    gm = traced(backward, *EACH[0])
    merge.merge_reductions(gm.graph)
    assert count(gm, "reduce_scatter_tensor") == 3 and count(gm, "all_reduce") == 1


def test_merged_ones_have_a_limit(monkeypatch):
    monkeypatch.setattr(merge, "MOST", SMALL + 8 * 4)
    gm = traced(lambda *a: [forward(*a)], *EACH[0])
    merge.merge_gathers(gm.graph)
    assert count(gm, "all_gather_into_tensor") == 4, "the bias is one too many"


def chain(x, a, b, c):
    """Three layers, [8, 8] each."""
    for shard in (a, b, c):
        x = x @ gather(shard)
    return [x]


SHARDS = [torch.randn(2, 8), *(torch.randn(4, 8) for _ in range(3))]


def test_a_gather_starts_where_the_one_before_is_waited_for(monkeypatch):
    layer = 8 * 8 * 4
    for ahead, starts in [(0, [1, 1, 2]), (2 * layer, [1, 1, 2]), (3 * layer, [1, 1, 1])]:
        monkeypatch.setattr(move, "AHEAD", ahead)
        gm = traced(chain, *SHARDS)
        move.prefetch_gathers(gm.graph)
        gm.graph.lint()
        order = names(gm)
        waits = [order.index(name) for name in ("wait_tensor", "wait_tensor_1", "wait_tensor_2")]
        gathers = [order.index(f"all_gather_into_tensor{end}") for end in ("", "_1", "_2")]
        # before which wait each gather stands
        assert [next(i for i, wait in enumerate(waits, 1) if at < wait) for at in gathers] == starts


def test_a_gradient_is_waited_for_when_others_need_the_room(monkeypatch):
    def grads(x, a, b, c):
        return [scatter(a @ a.t()), scatter(b @ b.t()), scatter(c @ c.t()), x + 1]

    one = 4 * 4 * 4
    for ahead, after in [(3 * one, [2, 2, 2]), (2 * one, [1, 2, 2]), (one, [0, 1, 2])]:
        monkeypatch.setattr(move, "AHEAD", ahead)
        gm = traced(grads, *SHARDS)
        move.delay_waits(gm.graph)
        gm.graph.lint()
        order = names(gm)
        assert order.index("wait_tensor_2") > order.index("add")
        starts = [order.index(f"reduce_scatter_tensor{end}") for end in ("", "_1", "_2")]
        waits = [order.index(f"wait_tensor{end}") for end in ("", "_1", "_2")]
        # how many others have started when each is waited for
        assert [sum(start < wait for start in starts) - 1 for wait in waits] == after


def test_what_depends_on_data_stays_where_it_is():
    def other(x, a, b, c):
        return [gather(x * a[:2]) @ b.t(), scatter(b @ b.t()) @ c[:, :4].t(), x + 1]

    gm = traced(other, *SHARDS)
    before = names(gm)
    schedule_collectives(gm.graph)
    assert names(gm) == before
