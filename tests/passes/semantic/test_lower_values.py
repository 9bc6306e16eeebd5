"""Per-token values without logits: which are lowered, to what, and what stays as the user wrote it."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured, execute
from models import HIDDEN, SEQ, VOCAB
from torch import nn

from cggr_compile.passes.nodes import fake_value, op_name, shape_of
from cggr_compile.passes.semantic.lower_values import LowerValues
from cggr_compile.pipeline import semantic_passes

LABELS = models.make_batch()["labels"]
TARGET = LABELS[:, 1:]
KNOWN = TARGET != -100
NEXT = TARGET.clamp_min(0)
PAD = 5
PADDED = TARGET.where(KNOWN, PAD)
CALL = "token_log_probs.default"


@pytest.fixture(autouse=True)
def _one_layer(monkeypatch):
    monkeypatch.setattr(models, "LAYERS", 1)


def log_p(z):
    return F.log_softmax(z[:, :-1], -1).gather(-1, NEXT[..., None])[..., 0]


def entropy(z):
    logs = z.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def of_loss(z, **kwargs):
    return F.cross_entropy(z[:, :-1].reshape(-1, VOCAB), TARGET.reshape(-1), reduction="none", **kwargs)


def policy(z):
    return log_p(z)


def probability(z):
    return torch.softmax(z[:, :-1], dim=-1).gather(-1, NEXT[..., None])


def label_logit_and_its_gap(z):
    z = z[:, :-1].float()
    gap = z.logsumexp(-1, keepdim=True) - z.gather(-1, NEXT[..., None])
    return gap + 0.1 * z.mean(-1, keepdim=True)


def log_softmax_by_hand(z):
    z = z[:, :-1]
    return (z - z.logsumexp(-1, keepdim=True)).gather(-1, NEXT[..., None])


def entropies(z):
    p, logs = z.softmax(-1), z.log_softmax(-1)
    by_logits = z.logsumexp(-1) - (p * z).sum(-1)
    return entropy(z) + by_logits - (p * logs).sum(dim=-1) + torch.special.entr(p).sum(-1)


def mean_entropy(z):
    logs = z.log_softmax(-1)
    return (-logs.exp() * logs).mean(-1) + logs.mean(-1) + z.sum(-1) / VOCAB


def collision(z):
    p = z.softmax(-1)
    return p.square().sum(-1) + (p * p).sum(-1) + (p**2).sum(-1)


def loss(z):
    return of_loss(z)


def ignoring_another(z):
    """A class of the vocabulary."""
    return F.cross_entropy(z[:, :-1].transpose(1, 2), PADDED, ignore_index=PAD, reduction="none")


def smoothed(z):
    return of_loss(z, label_smoothing=0.2)


def nll(z):
    return F.nll_loss(-1.0 * -z.log_softmax(-1)[:, :-1].flatten(0, 1), TARGET.flatten(), reduction="none")


def with_z_loss(z):
    return of_loss(z).view(2, -1) + 0.1 * z.logsumexp(-1)[:, :-1].square()


def tempered(z):
    return log_p(z / 0.7)


def capped(z):
    return log_p(2 * (5 * torch.tanh(0.5 * z / 5))) + entropy(2 * (5 * torch.tanh(0.5 * z / 5)))[:, :-1]


def padded(z):
    return z[:, :-1, 3:103].log_softmax(-1).gather(-1, NEXT.clamp(max=99)[..., None])


def one_sequence_each(z):
    return torch.stack([F.cross_entropy(z[b, 2:12], LABELS[b, 3:13], reduction="none") for b in range(2)])


def overwritten(z):
    each = log_p(z)
    each[~KNOWN] = 0.0
    return each


LOWERED = [
    policy,
    probability,
    label_logit_and_its_gap,
    log_softmax_by_hand,
    entropies,
    mean_entropy,
    collision,
    loss,
    ignoring_another,
    smoothed,
    nll,
    with_z_loss,
    tempered,
    capped,
    padded,
    one_sequence_each,
    overwritten,
]


class Model(nn.Module):
    """Hidden state and head; ``head`` says how the head is written."""

    def __init__(self, head: str = "linear") -> None:
        super().__init__()
        self.head = head
        self.embed, self.layer = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=head == "bias")
        self.weight = nn.Parameter(torch.zeros(HIDDEN, VOCAB))
        self.bias = nn.Parameter(torch.zeros(VOCAB))
        models.randomise(self)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(self.embed(ids))
        if self.head == "stored [H, V]":
            return hidden @ self.weight
        if self.head == "two":
            return self.lm_head(hidden), self.layer(hidden.tanh()) @ self.weight
        if self.head == "bias behind":
            return F.linear(hidden, self.lm_head.weight) + self.bias
        if self.head == "flat":
            return self.lm_head(hidden.view(-1, HIDDEN)).view(*ids.shape, VOCAB)
        if self.head == "chunks":
            return torch.cat([self.lm_head(piece) for piece in hidden.split(5, dim=1)], dim=1)
        if self.head == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.lm_head(hidden)
        return self.lm_head(hidden)


def lowered(function: Any, model: nn.Module) -> Captured:
    ids = models.make_batch()["input_ids"]
    found = Captured(lambda: function(model(ids)), options={"min_tokens_ratio": 0.5})
    found.run("lower_values")
    return found


def check(function: Any, model: nn.Module, **tolerance: float) -> Captured:
    """Values and gradients are those of the user's code, and no tensor has an axis over the vocabulary."""
    found = lowered(function, model)
    assert found.results["lower_values"].matched, found.results["lower_values"].reason
    found.check_shapes()
    for node in found.gm.graph.nodes:
        value = fake_value(node)
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            is_logits = isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] in (VOCAB, 100)
            assert not is_logits or node.op == "placeholder" or op_name(node) == "get_attr", node
    want = function(model(models.make_batch()["input_ids"]))
    got = found.gm(*found.inputs)
    got = got[0] if isinstance(got, (tuple, list)) else got
    torch.testing.assert_close(got, want, **tolerance)
    along = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(model.parameters())
    one, other = (torch.autograd.grad((v * along).sum(), parameters, allow_unused=True) for v in (got, want))
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)
    return found


@pytest.mark.parametrize("function", LOWERED, ids=lambda function: function.__name__)
def test_values(function: Any) -> None:
    check(function, Model())


@pytest.mark.parametrize("head", ["bias", "bias behind", "stored [H, V]", "flat", "chunks", "autocast"])
def test_heads(head: str) -> None:
    loose = {"rtol": 3e-2, "atol": 3e-2} if head == "autocast" else {}
    found = check(lambda z: log_p(z) + entropy(z)[:, :-1], Model(head), **loose)
    assert found.operators()[CALL] == 1


def test_two_heads() -> None:
    found = check(lambda logits: log_p(logits[0]) + log_p(logits[1]), Model("two"))
    assert found.operators()[CALL] == 2


def call_of(found: Captured) -> Any:
    (call,) = (node for node in found.gm.graph.nodes if op_name(node) == CALL)
    return call


def labels_of(function: Any) -> torch.Tensor:
    found = lowered(function, Model())
    labels = call_of(found).args[3]
    return execute(found, labels)[0]


def test_work_is_where_labels_are() -> None:
    """A position without a label, or behind the last one that has a value, has none in the call."""
    none = torch.full((2, 1), -100)
    assert torch.equal(labels_of(loss), torch.cat([TARGET, none], 1))
    ignored = int(NEXT[0, 0])
    assert torch.equal(labels_of(ignoring_another), torch.cat([TARGET.where(ignored != TARGET, -100), none], 1))
    assert torch.equal(labels_of(policy), torch.cat([NEXT, none], 1))
    assert torch.equal(labels_of(with_z_loss), torch.cat([TARGET.where(KNOWN, 0), none], 1))
    assert torch.equal(labels_of(entropies), torch.zeros(2, SEQ, dtype=torch.long))
    inside = labels_of(one_sequence_each)[:, 2:12]
    assert torch.equal(inside, LABELS[:, 3:13])


def test_values_are_written_in_the_users_dtype() -> None:
    found = lowered(lambda z: log_p(z.bfloat16()), Model())
    assert found.gm(*found.inputs)[0].dtype == torch.bfloat16


def against_a_teacher(z):
    return F.kl_div(z.log_softmax(-1), torch.full((VOCAB,), 1 / VOCAB), reduction="none").sum(-1)


def squared(z):
    return z.square().mean(-1) + entropy(z)


def weighted(z):
    return of_loss(z, weight=torch.linspace(0.5, 1.5, VOCAB))


def temperature_of_tokens(z):
    return log_p(z / (1 + LABELS[..., None].abs()))


def late_bias(z):
    return log_p(z + torch.linspace(-1, 1, VOCAB))


def negative_logits(z):
    return log_p(-z)


def two_classes(z):
    return log_p(z) + F.log_softmax(z[:, :-1], -1)[..., 0]


def two_labels(z):
    return log_p(z) + z[:, :-1].log_softmax(-1).gather(-1, (NEXT + 1).clamp(max=VOCAB - 1)[..., None])[..., 0]


def two_temperatures(z):
    return log_p(z) + entropy(z / 2)[:, :-1]


def several_classes(z):
    return z.log_softmax(-1).gather(-1, LABELS.clamp_min(0)[..., None].expand(-1, -1, 2)).sum(-1)


def labels_of_the_logits(z):
    return F.log_softmax(z, -1).gather(-1, z.argmax(-1, keepdim=True))


def read_besides(z):
    return log_p(z) * (z[:, :-1].argmax(-1) == NEXT)


def returned(z):
    return log_p(z), z


KEPT = {
    against_a_teacher: "'kl_div'",
    squared: "'square'",
    weighted: "'by_rows'",
    temperature_of_tokens: "'div'",
    late_bias: "'add'",
    negative_logits: "'neg'",
    two_classes: "'getitem'",
    two_labels: "two classes at a position",
    two_temperatures: "two scales",
    several_classes: "'gather'",
    labels_of_the_logits: "'argmax'",
    read_besides: "'argmax'",
    returned: "leave the graph",
}


@pytest.mark.parametrize("function", KEPT, ids=lambda function: function.__name__)
def test_what_is_not_known_stays(function: Any) -> None:
    found = lowered(function, Model())
    result = found.results["lower_values"]
    assert not result.matched and KEPT[function] in result.reason
    assert any(shape_of(node)[-1:] == (VOCAB,) for node in found.gm.graph.nodes if op_name(node) == "linear")


def test_twice_is_once() -> None:
    found = lowered(policy, Model())
    del found.results["lower_values"]
    assert not found.run("lower_values", [LowerValues()]).matched


def test_ratio_of_one_keeps_the_users_graph() -> None:
    found = Captured(lambda: policy(Model()(models.make_batch()["input_ids"])), options={"min_tokens_ratio": 1.0})
    assert "lower_values" not in [one.name for one in semantic_passes(found.ctx)]
