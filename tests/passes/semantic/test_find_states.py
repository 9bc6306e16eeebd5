"""Where the mixing of positions ends: the states in front of the head."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured
from models import VOCAB
from reference import assert_same, backward, reference
from torch import nn
from training import metrics, picks

from cggr_compile.passes.facts import FinalStates, LayerStack
from cggr_compile.passes.nodes import op_name

H, SEQ = 8, 6
IDS = torch.randint(0, VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(0))


class Ending(nn.Module):
    """Positions are mixed by a running sum; what comes behind it is the subject."""

    def __init__(self, ending):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.head, self.inner = nn.Embedding(VOCAB, H), nn.Linear(H, VOCAB), nn.Linear(H, H)
        self.norm, self.table, self.ending = nn.LayerNorm(H), nn.Parameter(torch.randn(SEQ, H)), ending

    def logits(self, ids):
        return self.head(self.ending(self, self.wte(ids).cumsum(1)))

    def forward(self, ids):
        logits = self.logits(ids)
        return F.cross_entropy(logits.reshape(-1, VOCAB), ids[:, : logits.numel() // (2 * VOCAB)].reshape(-1))


def written(m, x):
    y = x * 2
    x[:, 0] = 0.0
    return y + x


# name: (what is behind the sum, what the states are computed by, how many calls follow, the first position they keep)
ENDINGS = {
    "nothing": (lambda m, x: x, "cumsum", 0, 0),
    "a norm": (lambda m, x: m.norm(x), "cumsum", 1, 0),
    "an MLP around": (lambda m, x: m.norm(x + m.inner(F.gelu(x)) * torch.sigmoid(x)), "cumsum", 6, 0),
    "a top-k": (lambda m, x: m.norm(x * x.topk(1, -1).values), "cumsum", 4, 0),
    "chunks": (lambda m, x: m.inner(x.repeat(1, 1, 2).chunk(2, -1)[1]), "repeat", 3, 0),
    "flat": (lambda m, x: m.norm(x.reshape(-1, H)), "cumsum", 2, 0),
    "a part of the sequence": (lambda m, x: m.norm(x)[:, 1:], "cumsum", 2, 1),
    # ... and what mixes positions again
    "another position": (lambda m, x: m.norm(x - x[:, :1]), "sub", 1, 0),
    "positions before": (lambda m, x: x + F.pad(x[:, :-1], (0, 0, 1, 0)), "add", 0, 0),
    "windows": (lambda m, x: m.norm(x[:, 1:] - x[:, :-1]), "sub", 1, 0),
    "a mask": (lambda m, x: m.norm(x * (IDS != 3)[..., None].float()), "mul", 1, 0),
    "learned positions": (lambda m, x: m.norm(x + m.table), "add", 1, 0),
    "dropout": (lambda m, x: m.norm(F.dropout(x, 0.5)), "dropout", 1, 0),
    "positions regrouped": (lambda m, x: m.norm(x.view(SEQ, 2, H)).view(2, SEQ, H), "view", 0, 0),
    "a write": (written, "add", 0, 0),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_states(name):
    ending, operator, calls, start = ENDINGS[name]
    captured = Captured(Ending(ending), IDS)
    result = captured.run("find_states")
    assert result.matched and captured.ctx.get(LayerStack) is None
    found = captured.ctx[FinalStates]
    assert (op_name(found.states), len(found.tail), found.tail_start) == (operator, calls, start), found


@pytest.mark.parametrize("name", models.slow_but(["another position", "an MLP around", "a top-k", "a write"], ENDINGS))
def test_gradients(name):
    model = Ending(ENDINGS[name][0])
    start = ENDINGS[name][3]
    models.compiled(model, min_tokens_ratio=0.5, scoring="random", selection="random")
    torch.manual_seed(3)
    got = backward(model, model(IDS))
    assert metrics(model)["level"] == "loss"
    size = len(model.logits(IDS).view(2, -1, VOCAB)[0])
    target = F.pad(IDS[:, :size], (start, SEQ - size - start), value=-100)

    def logits():
        torch.manual_seed(3)
        return F.pad(model.logits(IDS).view(2, size, VOCAB), (0, 0, start, SEQ - size - start))

    if name != "dropout":  # which draws otherwise eagerly
        assert_same(got, reference(model, logits, target[:, : logits().shape[1]], picks(model), gradient="exact"))


def test_logits_that_are_written_to_stay_dense():
    """Rows of the head would be copied without the write."""
    model = Ending(lambda m, x: x)
    model.head.register_forward_hook(lambda module, args, out: out[..., :5].sub_(3.0) is None or out)
    models.compiled(model, min_tokens_ratio=0.5, fallback="silent")
    got = backward(model, model(IDS))
    assert metrics(model)["level"] == "dense" and "writes in place" in metrics(model)["fallback_reason"]
    assert_same(got, backward(model, model._call_impl(IDS)))


def test_nothing_of_the_batch():
    """No embedding, no states: the graph stays as it was, for the reason that there are no layers."""
    table = torch.ones(VOCAB, H, requires_grad=True)
    captured = Captured(lambda: F.cross_entropy(F.linear(torch.ones(2, SEQ, H), table).flatten(0, 1), IDS.flatten()))
    result = captured.run("find_states")
    assert not result.matched and result.cause is not None and "no token embedding" in result.reason


def test_layers_come_first():
    captured = Captured(models.PlainLM(), **models.make_batch())
    assert not captured.run("find_states").matched and captured.ctx.get(LayerStack) is not None
