"""The arithmetic of captured forward passes: products with weights, those of experts by their rows."""

from __future__ import annotations

import math

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured
from four_bits import pack
from torch.utils.flop_counter import FlopCounterMode

from cggr_compile.passes.analysis.flops import weight_flops

TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 12, 8, 16, 4, 2


def captured(function, *inputs):
    """The graph Dynamo makes of ``function``."""
    return Captured(function, *inputs).gm.graph


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_as_pytorch_counts_it(tied):
    """Without attention, whose products have no weight; a table that is only looked up multiplies nothing."""
    model, ids = models.Decoder(tied=tied, bias=True, fused=False), models.make_batch()["input_ids"]
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(ids)
    counts = counter.get_flop_counts()["Global"]
    attention = counts.pop(torch.ops.aten.bmm)
    batch, length = ids.shape
    assert attention == models.LAYERS * 4 * batch * length**2 * models.HIDDEN
    assert weight_flops(captured(model, ids)) == sum(counts.values()) > 0


def matrices(*shape):
    return torch.nn.Parameter(torch.randn(shape))


@pytest.mark.parametrize(
    ("function", "shape", "products"),
    [
        (lambda x, w: x @ w, (HIDDEN, INNER), 1),
        (lambda x, w: x.matmul(w.half().float()) + x.matmul(w), (HIDDEN, INNER), 2),
        (lambda x, w: torch.addmm(x, x, w), (HIDDEN, HIDDEN), 1),
        (lambda x, w: torch.einsum("th,eih->eti", x, w), (EXPERTS, INNER, HIDDEN), 1),
        (lambda x, w: torch.bmm(x.expand(EXPERTS, -1, -1), w.mT), (EXPERTS, INNER, HIDDEN), 1),
        (lambda x, w: F.linear(x, w[0]) * w.sum(), (EXPERTS, INNER, HIDDEN), 1 / EXPERTS),
        (lambda x, w: x @ x.T + w.sum(), (HIDDEN, INNER), 0),
        (lambda x, w: F.embedding(x.argmax(1), w), (HIDDEN, INNER), 0),
    ],
)
def test_ways_to_multiply(function, shape, products):
    ids, table = torch.arange(TOKENS), torch.randn(TOKENS, HIDDEN)
    graph = captured(lambda ids, table, w: function(table[ids], w), ids, table, matrices(*shape))
    assert weight_flops(graph) == products * 2 * TOKENS * math.prod(shape)


def test_weights_in_four_bits():
    """Of what is trained in front of them, inside of an autograd function, and of what is not."""
    layer, x = pack(torch.nn.Sequential(torch.nn.Linear(HIDDEN, INNER, bias=False))), torch.randn(TOKENS, HIDDEN)
    assert weight_flops(captured(layer, x)) == 2 * TOKENS * HIDDEN * INNER
    graph = captured(lambda x, scale: layer(x * scale), x, torch.nn.Parameter(torch.ones(HIDDEN)))
    assert any("autograd_function" in str(node.target) for node in graph.nodes)
    assert weight_flops(graph) == 2 * TOKENS * HIDDEN * INNER


def test_factors_of_two_types_under_autocast():
    def function(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(F.linear(x, w), w)

    graph = captured(function, torch.randn(TOKENS, HIDDEN), matrices(HIDDEN, HIDDEN))
    assert weight_flops(graph) == 2 * 2 * TOKENS * HIDDEN**2


def test_grouped_products_count_their_rows():
    offsets = torch.tensor([3, 3, 10, TOKENS], dtype=torch.int32)

    def function(x, w):
        return torch.ops.transformers.grouped_mm_fallback(x * 2, w.mT, offsets)

    pytest.importorskip("transformers.integrations.moe")
    graph = captured(function, torch.randn(TOKENS, HIDDEN), matrices(EXPERTS, INNER, HIDDEN))
    assert weight_flops(graph) == 2 * TOKENS * HIDDEN * INNER


@pytest.mark.parametrize("clamped", [False, True])
def test_experts_count_the_rows_that_are_routed(clamped):
    chosen = torch.rand(TOKENS, EXPERTS).argsort(1)[:, :TOP_K]
    weights = torch.rand(TOKENS, TOP_K)

    def function(x, gate_up, down):
        x = x * 2
        if clamped:
            biases = gate_up.new_zeros(EXPERTS, 2 * INNER), down.new_zeros(EXPERTS, HIDDEN)
            return torch.ops.cggr.moe_clamped(x, gate_up, biases[0], down, biases[1], weights, chosen, 1.7, 7.0)
        return torch.ops.cggr.moe(x, gate_up, down, weights, chosen)

    experts = matrices(EXPERTS, 2 * INNER, HIDDEN), matrices(EXPERTS, HIDDEN, INNER)
    graph = captured(function, torch.randn(TOKENS, HIDDEN), *experts)
    assert weight_flops(graph) == 2 * TOKENS * TOP_K * 3 * INNER * HIDDEN


@pytest.mark.parametrize("after_lowering", [False, True])
def test_a_mixture_of_experts(after_lowering):
    """Before and after ``lower_experts``: the number of experts that a token goes to counts, not how many there are."""
    counts = []
    for experts in (4, 8):
        model = models.family("mixtral", num_hidden_layers=1, num_local_experts=experts)
        step = Captured(model, **models.make_batch())
        if after_lowering:
            assert step.run("lower_experts").matched
        counts.append(weight_flops(step.gm.graph))
    config, rows = model.config, math.prod(models.make_batch()["input_ids"].shape)
    router = config.hidden_size * 4
    assert counts[1] - counts[0] == 2 * rows * router
    of_experts = config.num_experts_per_tok * 3 * config.hidden_size * config.intermediate_size
    attention = 2 * config.hidden_size * (config.hidden_size + config.hidden_size // 2)
    head = config.hidden_size * config.vocab_size
    assert counts[0] == 2 * rows * (of_experts + attention + head + router)
