"""OpenAttention: nn.MultiheadAttention as its parts, with the same numbers, and a decoder made of it."""

from __future__ import annotations

import contextlib

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured
from reference import assert_same, backward, reference
from torch import nn
from training import metrics, picks

import cggr_compile

H, HEADS, S = 16, 2, 6
MASKS = {
    "causal": lambda: nn.Transformer.generate_square_subsequent_mask(S),
    "bool": lambda: torch.ones(S, S, dtype=torch.bool).triu(1),
    "float": lambda: nn.Transformer.generate_square_subsequent_mask(S),
}


def attend(attention, mask, **arguments):
    causal = arguments.pop("is_causal", False)

    def call(x):
        return attention(x, x, x, attn_mask=mask, need_weights=False, is_causal=causal, **arguments)[0].sin()

    return call


def results(run, attention, x):
    out = run(x)
    out = out[0] if isinstance(out, tuple) else out
    grads = torch.autograd.grad(out.square().sum(), [x, *attention.parameters()])
    return [out, *grads]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_the_same_numbers(mask, bias):
    attention = models.randomise(nn.MultiheadAttention(H, HEADS, bias=bias, batch_first=True))
    x = torch.randn(3, S, H, requires_grad=True)
    call = attend(attention, MASKS[mask](), is_causal=mask == "causal")
    captured = Captured(call, x)
    assert captured.run("open_attention").reason == "1 of 1 calls of multi_head_attention_forward"
    operators = captured.operators()
    assert "multi_head_attention_forward" not in operators and operators["scaled_dot_product_attention"] == 1
    captured.check_shapes()
    captured.gm.recompile()
    got = results(lambda _: captured.gm(*captured.inputs), attention, x)
    for one, other in zip(got, results(call, attention, x), strict=True):
        torch.testing.assert_close(one, other)
    del captured.results["open_attention"]
    assert not captured.run("open_attention").matched


def other_inputs(attention, x):
    return attention(x, x * 2, x * 2, need_weights=False)[0]


def weights(attention, x):
    return attention(x, x, x)[0]


def padding(attention, x):
    return attention(x, x, x, key_padding_mask=torch.zeros(3, S, dtype=torch.bool), need_weights=False)[0]


def masks_by_head(attention, x):
    return attention(x, x, x, attn_mask=torch.zeros(3 * HEADS, S, S), need_weights=False)[0]


def no_batch(attention, x):
    return attention(x[0], x[0], x[0], need_weights=False)[0]


def plain(attention, x):
    return attention(x, x, x, need_weights=False)[0]


def swapped_without_gradient(attention, x):
    with torch.no_grad():
        x = x.transpose(0, 1)
    return plain(attention, x)


@pytest.mark.parametrize(
    ("call", "arguments", "reason"),
    [
        (other_inputs, {}, "no self-attention"),
        (weights, {}, "need_weights=True"),
        (padding, {}, "key_padding_mask"),
        (masks_by_head, {}, "one for every head"),
        (no_batch, {}, "without a batch"),
        (plain, {"batch_first": False}, "batch_first=False"),
        (swapped_without_gradient, {"batch_first": False}, "another grad mode"),
        (plain, {"kdim": H, "vdim": H, "add_bias_kv": True}, "bias_k"),
        (plain, {"add_zero_attn": True}, "add_zero_attn"),
    ],
)
def test_left_alone(call, arguments, reason):
    attention = nn.MultiheadAttention(H, HEADS, **{"batch_first": True, **arguments})
    result = Captured(lambda x: call(attention, x), torch.randn(3, S, H)).run("open_attention")
    assert not result.matched and reason in result.reason


class Block(nn.Module):
    """As people write it; ``swapped``: around an attention that wants the positions in front."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.swapped = swapped
        self.norm, self.up, self.down = (
            nn.LayerNorm(models.HIDDEN),
            nn.Linear(models.HIDDEN, 64),
            nn.Linear(64, models.HIDDEN),
        )
        self.attention = nn.MultiheadAttention(models.HIDDEN, models.HEADS, batch_first=not swapped)

    def forward(self, x, mask):
        h = self.norm(x)
        h = h.transpose(0, 1) if self.swapped else h
        h = self.attention(h, h, h, attn_mask=mask, need_weights=False, is_causal=True)[0]
        x = x + (h.permute(1, 0, 2) if self.swapped else h)
        return x + self.down(F.gelu(self.up(x)))


class OfPyTorch(nn.Module):
    """A decoder of ``nn.TransformerEncoderLayer``, or of blocks around ``nn.MultiheadAttention``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embedding, self.head = nn.Embedding(models.VOCAB, models.HIDDEN), nn.Linear(models.HIDDEN, models.VOCAB)
        self.layers = nn.ModuleList(self._layer() for _ in range(2))
        models.randomise(self)

    def _layer(self):
        if self.kind in ("block", "swapped"):
            return Block(self.kind == "swapped")
        sizes = (models.HIDDEN, models.HEADS, 64)
        return nn.TransformerEncoderLayer(*sizes, dropout=0.0, batch_first=True, norm_first=self.kind != "post-norm")

    def attentions(self):
        return [module for module in self.modules() if isinstance(module, nn.MultiheadAttention)]

    def forward(self, ids):
        x = self.embedding(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        mask = mask < 0 if self.kind == "bool" else mask
        for layer in self.layers:
            arguments = {} if isinstance(layer, Block) else {"is_causal": self.kind == "causal"}
            x = layer(x, mask, **arguments)
        return self.head(x)


@contextlib.contextmanager
def gates(model, swapped):
    """The reference's: keys and values are made of ``models.kv_input``."""

    def gate(_, args, kwargs):
        query, key, _ = args
        key = models.kv_input(key.transpose(0, 1)).transpose(0, 1) if swapped else models.kv_input(key)
        return (query, key, key), kwargs

    handles = [one.register_forward_pre_hook(gate, with_kwargs=True) for one in model.attentions()]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    "kind", models.slow_but(["bool", "swapped"], ["causal", "float", "bool", "post-norm", "block", "swapped"])
)
def test_a_decoder_is_routed(kind):
    model, batch = OfPyTorch(kind), models.make_batch()
    ids, labels = batch["input_ids"], batch["labels"]
    step = models.compiled(lambda: F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()))
    got = backward(model, step())
    (report,) = cggr_compile.runtime(model).reports
    assert metrics(model)["level"] == "routed" and len(report.record("find_stack").details["blocks"]) == 2
    assert report.record("row_sparse").details["densified"] == {}

    def logits():
        with gates(model, kind == "swapped"):
            return model(ids)

    assert_same(got, reference(model, logits, labels, picks(model)))
