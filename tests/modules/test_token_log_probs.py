from __future__ import annotations

import pytest
import torch
from ops.test_token_log_probs import VALUES, check, of_logits
from torch import nn

from cggr_compile import TokenLogProbs, token_log_probs
from cggr_compile.backend import cggr

B, S, H, V = 2, 6, 8, 20


def make(dtype=torch.float32, bias=True):
    hidden = torch.randn(B, S, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, V, (B, S))
    labels[:, :2] = -100
    return hidden, weight, torch.randn(V, dtype=dtype, requires_grad=True) if bias else None, labels


def loss(values):
    """Of what an RL step does with them: a ratio, an entropy bonus."""
    return (values.log_prob.exp() * values.log_prob - 0.1 * values.entropy).sum()


def test_the_fields_and_the_values():
    hidden, weight, bias, labels = make()
    assert TokenLogProbs._fields == VALUES
    values = token_log_probs(hidden, weight, labels, bias=bias)
    wanted = of_logits(hidden, weight, bias, labels, 1.0, 0.0)
    assert values[2:] == (None,) * 4
    torch.testing.assert_close(values[:2], wanted[:2])
    values = token_log_probs(hidden, weight, labels, bias=bias, outputs=VALUES)
    torch.testing.assert_close(tuple(values), wanted)
    flat = token_log_probs(hidden[0], weight, labels[0], bias=bias, outputs=["top1_hit"])
    assert torch.equal(flat.top1_hit, wanted[5][0]) and flat.log_prob is None


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_temperature_divides_the_capped_logits(softcap):
    hidden, weight, bias, labels = make(torch.float64)
    values = token_log_probs(
        hidden, weight, labels, bias=bias, temperature=0.7, softcap=softcap, scale=0.5, outputs=VALUES
    )
    z = 0.5 * nn.functional.linear(hidden, weight, bias)
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / 0.7
    wanted = of_logits(z, torch.eye(V, dtype=torch.float64), None, labels, 1.0, 0.0)
    torch.testing.assert_close(tuple(values), wanted)
    inputs = (hidden, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(loss(values), inputs),
                               torch.autograd.grad(loss(TokenLogProbs(*wanted)), inputs))  # fmt: skip


def test_the_ignored_index_may_be_a_word():
    hidden, weight, _, labels = make(bias=False)
    padded = torch.where(labels == -100, 3, labels)
    labels = torch.where(padded == 3, -100, padded)
    wanted = token_log_probs(hidden, weight, labels)
    torch.testing.assert_close(token_log_probs(hidden, weight, padded, ignore_index=3), wanted)


def test_rows():
    hidden, weight, _, labels = make(bias=False)
    rows = torch.tensor([[2, 4, 0], [5, 3, 1]])
    keep = torch.tensor([[True, True, False], [True, False, True]])
    weights = torch.tensor([[2.0, 3.0, 5.0], [7.0, 11.0, 13.0]])
    values = token_log_probs(hidden, weight, labels, rows=rows, keep=keep, weights=weights)
    torch.testing.assert_close(values[:2], token_log_probs(hidden, weight, labels)[:2])
    at = torch.zeros(B, S).scatter(1, rows, keep * weights)
    wanted = of_logits(hidden, weight, None, labels, 1.0, 0.0)
    got = torch.autograd.grad((values.log_prob.exp() + values.entropy).sum(), (hidden, weight))
    check(got, torch.autograd.grad((at * (wanted[0].exp() + wanted[1])).sum(), (hidden, weight)), 1e-5)
    flat = token_log_probs(hidden[0], weight, labels[0], rows=rows[0])
    (got,) = torch.autograd.grad(flat.entropy.sum(), hidden)
    wanted = of_logits(hidden, weight, None, labels, 1.0, 0.0)
    (wanted,) = torch.autograd.grad(wanted[1][0, rows[0]].sum(), hidden)
    torch.testing.assert_close(got, wanted)


def test_under_autocast():
    hidden, weight, bias, labels = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = token_log_probs(hidden, weight, labels, bias=bias)
        double = token_log_probs(hidden.double(), weight.double(), labels)
    cast = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight, bias)]
    twin = token_log_probs(*cast[:2], labels, bias=cast[2])
    assert torch.equal(values.log_prob, twin.log_prob) and values.log_prob.dtype == torch.float32
    assert double.log_prob.dtype == torch.float64
    found = torch.autograd.grad(loss(values), (hidden, weight, bias))
    for got, wanted in zip(found, torch.autograd.grad(loss(twin), cast), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, wanted.float())


def in_one_graph(backend, **options):
    hidden, weight, bias, labels = make()
    rows, keep = torch.tensor([[2, 4], [5, 3]]), torch.tensor([[True, True], [True, False]])

    def step(hidden, weight, bias):
        normed = nn.functional.rms_norm(hidden, (H,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = token_log_probs(normed, weight, labels, bias=bias, temperature=0.9)
        some = token_log_probs(normed, weight, labels, bias=bias, softcap=5.0, rows=rows, keep=keep, outputs=VALUES)
        return loss(cast) + loss(some) + some.mean_logit.sum()

    wanted = torch.autograd.grad(step(hidden, weight, bias), (hidden, weight, bias))
    compiled = torch.compile(step, fullgraph=True, backend=backend, **options)
    found = torch.autograd.grad(compiled(hidden, weight, bias), (hidden, weight, bias))
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


def test_in_one_graph():
    in_one_graph("aot_eager")


def test_in_one_graph_of_our_backend():
    """Every label is selected."""
    labels = {"selection": "labels", "max_selected": 1.0}
    in_one_graph(cggr, options={"fallback": "silent", "compiler": "eager", **labels})


@pytest.mark.slow
def test_in_one_graph_of_inductor():
    in_one_graph("inductor")


BAD = {
    "outputs must be names": dict(outputs=("log_prob", "loss")),
    "outputs must be names out": dict(outputs="entropy"),
    "temperature must be > 0, got 0.0": dict(temperature=0.0),
    "temperature must be a number, got Tensor": dict(temperature=torch.ones(())),
    "softcap must be >= 0": dict(softcap=-1.0),
    "keep and weights need rows": dict(weights=torch.ones(B, 2)),
    "rows must be int64": dict(rows=torch.zeros(B, 2)),
    "rows must be int64 .2, 'K'.": dict(rows=torch.zeros(3, 2, dtype=torch.int64)),
    "keep must be bool": dict(rows=torch.zeros(B, 2, dtype=torch.int64), keep=torch.ones(B, 2)),
    "weights must be floats": dict(rows=torch.zeros(B, 2, dtype=torch.int64), weights=torch.ones(B, 3)),
    "bias must be .20.": dict(bias=torch.ones(3)),
    r"hidden must be \[B, S, H\]": dict(hidden=torch.randn(8)),
    "weight must be .vocabulary, 8.": dict(weight=torch.randn(V, 3)),
    "weight must have the dtype of hidden": dict(weight=torch.randn(V, H).half()),
    "labels must be integers .2, 6.": dict(labels=torch.zeros(B, 3, dtype=torch.int64)),
}


def test_bad_arguments():
    hidden, weight, _, labels = make(bias=False)
    for message, wrong in BAD.items():
        with pytest.raises(ValueError, match=message):
            token_log_probs(**{"hidden": hidden, "weight": weight, "labels": labels, **wrong})
