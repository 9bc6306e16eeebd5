"""What a new attention operator takes: one adapter, here, and its place in the register."""

from __future__ import annotations

import math

import models
import pytest
import torch
import torch.nn.functional as F
from row_sparse_comparison import compare
from torch import Tensor

from cggr_compile.passes.patterns import attention
from cggr_compile.passes.patterns.attention import ADAPTERS, find_backward, is_attention
from cggr_compile.passes.patterns.attention.base import Arguments, AttentionAdapter, Backward, Forward
from cggr_compile.runtime import FallbackWarning

aten = torch.ops.aten


def scores(query: Tensor, key: Tensor) -> Tensor:
    hidden = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).triu(1)
    return torch.einsum("bqhd,bkhd->bhqk", query, key).mul(0.3).masked_fill(hidden, -torch.inf)


@torch.library.custom_op("cggr_tests::attention", mutates_args=())
def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of [B, S, heads, D], and the logarithms to base 2 of its sums, [B, S, heads]."""
    weights = scores(query, key)
    out = torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), value).contiguous()
    return out, (weights.logsumexp(-1) / math.log(2.0)).transpose(1, 2).contiguous()


@torch.library.custom_op("cggr_tests::attention_backward", mutates_args=())
def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, key and query."""
    weights = scores(query, key).softmax(-1)
    slope = torch.einsum("bqhd,bkhd->bhqk", grad, value)
    slope = weights * (slope - (slope * weights).sum(-1, keepdim=True)) * 0.3
    of_value = torch.einsum("bhqk,bqhd->bkhd", weights, grad)
    of_key, of_query = torch.einsum("bhqk,bqhd->bkhd", slope, query), torch.einsum("bhqk,bkhd->bqhd", slope, key)
    return of_value.contiguous(), of_key.contiguous(), of_query.contiguous()


forward.register_fake(lambda q, k, v: (q.new_empty(q.shape), q.new_empty(q.shape[:3])))
backward.register_fake(lambda g, q, k, v, o, s: tuple(t.new_empty(t.shape) for t in (v, k, q)))
forward.register_autograd(
    lambda ctx, grad, _: tuple(reversed(backward(grad, *ctx.saved_tensors))),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)
FORWARD = torch.ops.cggr_tests.attention.default
BACKWARD = torch.ops.cggr_tests.attention_backward.default


class OurBackward(Backward):
    def obstacle(self, batch):
        return "more than three sequences" if batch > 3 else None

    def arguments(self, rv, heads):
        _, *tensors, statistics = self.node.args
        query, key, value, out = (self.to_heads(rv, tensor) for tensor in tensors)
        by_heads = rv.emit.call(
            aten.mul.Tensor, rv.emit.call(aten.permute.default, statistics, [0, 2, 1]), math.log(2.0)
        )
        return Arguments(query, key, value, out, rv.gather(by_heads, heads[:3]), None, causal=True, scale=0.3)

    def to_heads(self, rv, tensor):
        return rv.emit.call(aten.permute.default, tensor, [0, 2, 1, 3])

    from_heads = to_heads


class Ours(AttentionAdapter):
    kind = "ours"

    def recognise(self, node, stream):
        return Forward(*node.args, -3, -3, node, node) if node.target is FORWARD else None

    def is_forward(self, node):
        return node.target is FORWARD

    def backward(self, node):
        results = {0: 2, 1: 1, 2: 0}
        return OurBackward(node, node.args[0], results, ("B", "S", None, None)) if node.target is BACKWARD else None


def attend(q, k, v, mask=None):
    return FORWARD(*(t.transpose(1, 2) for t in (q, k, v)))[0].transpose(1, 2)


def decoder():
    torch.manual_seed(0)
    return models.Decoder(attend, fused=False)


def loss_on(batch):
    return lambda model: F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


@pytest.fixture(autouse=True)
def _one_layer(monkeypatch):
    monkeypatch.setattr(models, "LAYERS", 1)


@pytest.mark.parametrize("kv_gradient", ["stop", "project"])
def test_an_adapter_is_all_that_it_takes(monkeypatch, kv_gradient):
    monkeypatch.setattr(attention, "ADAPTERS", (*ADAPTERS, Ours()))
    record = compare(decoder, loss_on(models.make_batch()), kv_gradient=kv_gradient)
    assert record.details["densified"] == {} and not record.details["dense_attention"]


def test_what_it_cannot_do_stays_dense_by_its_name(monkeypatch):
    monkeypatch.setattr(attention, "ADAPTERS", (*ADAPTERS, Ours()))
    record = compare(decoder, loss_on(models.make_batch(4)), kv_gradient="stop")
    assert record.details["dense_attention"] == {"more than three sequences": models.LAYERS}
    assert record.details["densified"] == {}


def test_without_an_adapter_there_is_no_attention():
    model, loss = decoder(), loss_on(models.make_batch())
    step = models.compiled(lambda: loss(model), fallback="warn")
    with pytest.warns(FallbackWarning, match="no attention over the sequence"):
        step()


def test_every_family_has_a_name_of_its_own():
    kinds = [adapter.kind for adapter in ADAPTERS]
    assert sorted(kinds) == ["flash", "flex", "sdpa", "softmax"]


def test_other_nodes_are_no_attention():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for node in (x, graph.call_function(aten.mm.default, (x, x)), graph.output(x)):
        assert not is_attention(node) and find_backward(node) is None
