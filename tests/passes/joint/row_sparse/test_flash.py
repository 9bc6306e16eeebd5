"""One attention layer by flash-attn's operators, through the joint passes alone: every form, against plain autograd.

The operators are those of tests/flash_attn_stand_in.py; what is expected is computed by other means.
"""

from __future__ import annotations

import flash_attn_stand_in as package
import pytest
import torch
import torch.nn.functional as F
from attention_layer import ON_ROWS, Layer, assert_close, masked

QUERY, KEY = torch.arange(9)[:, None], torch.arange(9)


def flash(prefix=0, **form):
    """``prefix``: learned keys in front."""

    def attend(q, k, v):
        k, v = (torch.cat([PREFIX[:, :, :prefix, : t.shape[3]], t], 2) if prefix else t for t in (k, v))
        return package.flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), **form).transpose(1, 2)

    return attend


def packed(queries, keys=None, **form):
    """One stream of sequences, which begin at ``queries``."""

    def attend(q, k, v):
        cumulative = [torch.tensor([*starts, q.shape[0] * 9], dtype=torch.int32) for starts in (queries, keys)]
        tokens = (t.transpose(1, 2).reshape(-1, t.shape[1], t.shape[3]) for t in (q, k, v))
        out = package.flash_attn_varlen_func(*tokens, *cumulative, 9, 9, **form)
        return out.view(q.shape[0], 9, q.shape[1], q.shape[3]).transpose(1, 2)

    keys = keys or queries
    return attend


def by_hand(mask, prefix=0, softcap=0.0, alibi=None):
    def attend(q, k, v):
        k, v = (torch.cat([PREFIX[:, :, :prefix], t], 2).repeat_interleave(2, 1) for t in (k, v))
        scores = q @ k.mT / 8**0.5
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        scores = scores if alibi is None else scores - alibi[:, None, None] * (QUERY - KEY).abs()
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v

    return attend


PREFIX = torch.randn(2, 2, 2, 8, generator=torch.Generator().manual_seed(1))
CAUSAL = QUERY >= KEY
DOCUMENT = (torch.arange(9) >= 4).long() + (torch.arange(9) >= 6)
OF_KEYS = (torch.arange(9) >= 3).long() + (torch.arange(9) >= 6)  # of lengths 3, 3, 3 for queries of 4, 2, 3
FORMS = {
    "soft-cap": (flash(causal=True, softcap=1.5), by_hand(CAUSAL, softcap=1.5)),
    "causal": (flash(causal=True), masked(CAUSAL, gqa=True)),
    "everything": (flash(), masked(torch.ones(9, 9).bool(), gqa=True)),
    "window": (flash(causal=True, window_size=(2, 2)), masked(CAUSAL & (QUERY - KEY <= 2), gqa=True)),
    "both sides": (flash(window_size=(1, 3)), masked((QUERY - KEY <= 1) & (KEY - QUERY <= 3), gqa=True)),
    "right side": (flash(window_size=(-1, 2)), masked(KEY - QUERY <= 2, gqa=True)),
    "scale": (
        flash(causal=True, softmax_scale=0.7),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7, enable_gqa=True),
    ),
    "prefix": (flash(2, causal=True), by_hand(torch.ones(9, 11).bool().tril(2), 2)),
    "window behind a prefix": (
        flash(2, causal=True, window_size=(3, 3)),
        by_hand(torch.ones(9, 11).bool().tril(2).triu(-1), 2),
    ),
}
PACKED = {
    "packed": (packed([0, 4, 6], causal=True), CAUSAL & (DOCUMENT[:, None] == DOCUMENT)),
    "packed, both ways": (packed([0, 4, 6]), DOCUMENT[:, None] == DOCUMENT),
    "packed, window": (
        packed([0, 4, 6], causal=True, window_size=(1, 1)),
        CAUSAL & (QUERY - KEY <= 1) & (DOCUMENT[:, None] == DOCUMENT),
    ),
    # the last query of a sequence sees up to its last key: 4 queries to 3 keys, then 2 to 3, then 3 to 3
    "packed, other keys": (
        packed([0, 4, 6], [0, 3, 6], causal=True),
        (DOCUMENT[:, None] == OF_KEYS)
        & (KEY - torch.tensor([3, 6, 9])[OF_KEYS] <= QUERY - torch.tensor([4, 6, 9])[DOCUMENT][:, None]),
    ),
}


def check(layer, expected, kv_gradient):
    got, result = layer.optimised(kv_gradient)
    layer.attend = expected
    assert_close(got, layer.expected(kv_gradient))
    return {name: result.details[name] for name in ON_ROWS}


@pytest.mark.parametrize(("form", "kv_gradient"), [*((form, "stop") for form in FORMS), ("window", "project")])
def test_forms(form, kv_gradient):
    attend, expected = FORMS[form]
    assert check(Layer(attend, kv_heads=2), expected, kv_gradient) == ON_ROWS


@pytest.mark.parametrize(("form", "kv_gradient"), [*((form, "project") for form in PACKED), ("packed", "stop")])
def test_packed_sequences(form, kv_gradient):
    attend, mask = PACKED[form]
    layer = Layer(attend, batch=1, kv_heads=2, slots=5, unused=1)
    assert check(layer, masked_or_nothing(mask), kv_gradient) == ON_ROWS


def masked_or_nothing(mask):
    """A query without any key has no output."""
    seen = mask.any(-1)[:, None]
    return lambda q, k, v: masked(mask | ~seen, gqa=True)(q, k, v) * seen


def test_one_sequence():
    assert check(Layer(flash(causal=True), batch=1, kv_heads=2), masked(CAUSAL, gqa=True), "project") == ON_ROWS


def test_padded_heads():
    """The package pads heads to a multiple of 8 itself."""
    assert check(Layer(flash(causal=True), width=5), masked(CAUSAL), "project") == ON_ROWS
    assert check(Layer(flash(causal=True), width=5), masked(CAUSAL), "stop") == ON_ROWS


def test_the_comparison_can_fail(monkeypatch):
    """A backward that forgets the window."""
    attend, expected = FORMS["window"]
    monkeypatch.setattr("cggr_compile.passes.patterns.attention.flash._mask", lambda rv, node: (None, True))
    with pytest.raises(AssertionError):
        check(Layer(attend, kv_heads=2), expected, "stop")


SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.05])
DENSE = {
    "flash-attn with ALiBi slopes": (flash(causal=True, alibi_slopes=SLOPES), by_hand(CAUSAL, alibi=SLOPES)),
    "flash-attn over packed sequences, in a batch of more than one": (
        packed([0, 4, 9, 15], causal=True),
        masked(torch.stack([CAUSAL & (k[:, None] == k) for k in (KEY >= 4, KEY >= 6)])[:, None], gqa=True),
    ),
}


@pytest.mark.parametrize("why", DENSE)
def test_dense_by_name(why):
    """With the gradient of the queries on rows all the same."""
    attend, expected = DENSE[why]
    details = check(Layer(attend, kv_heads=2), expected, "stop")
    assert details == {**ON_ROWS, "dense_attention": {why: 1}}


def test_dropout_is_dense_by_name():
    layer = Layer(flash(causal=True, dropout_p=0.3))
    torch.manual_seed(5)
    got, result = layer.optimised("stop")
    assert result.details["dense_attention"] == {"attention dropout 0.3": 1}
    torch.manual_seed(5)
    assert_close(got, layer.expected("stop"))
