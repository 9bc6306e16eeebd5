"""Which positions are candidates: where masks, labels and windows let a gradient through."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured, execute
from models import SEQ, VOCAB

from cggr_compile.causes import Cause
from cggr_compile.passes.facts import Candidates

BATCH = models.make_batch()
IDS, LABELS = BATCH["input_ids"], BATCH["labels"]
NEXT = LABELS[:, 1:].clamp_min(0)
KNOWN = F.pad(LABELS[:, 1:] != -100, (0, 1))
ALL = torch.ones(2, SEQ, dtype=torch.bool)
SHIFTED = F.pad(ALL[:, 1:], (0, 1))


@pytest.fixture(autouse=True)
def _one_layer(monkeypatch):
    monkeypatch.setattr(models, "LAYERS", 1)


def log_p(z):
    return z[:, :-1].log_softmax(-1).gather(-1, NEXT[..., None])[..., 0]


def multiplied(z, mask):
    return (log_p(z) * mask[:, 1:]).sum()


def multiplied_late(z, mask):
    ratio = log_p(z).exp()
    return (torch.min(2 * ratio, ratio.clamp(0.5, 1.5)).neg() * mask[:, 1:]).sum(-1).mean()


def chosen(z, mask):
    return torch.where(mask[:, 1:] != 0, log_p(z), 0.0).sum()


def filled(z, mask):
    return log_p(z).masked_fill(mask[:, 1:] == 0, 0.0).sum()


def written(z, mask):
    each = log_p(z)
    each[mask[:, 1:] == 0] = 0.0
    return each.sum()


def inside(z, mask):
    """Entries of all classes are masked, not their sum."""
    return (z[:, :-1].softmax(-1).square() * mask[:, 1:, None]).sum()


def with_a_late_mask(z, mask):
    each = log_p(z)
    return (each * (mask[:, 1:] * (each.detach() > -4).float())).sum()


def labels(z, mask):
    return F.cross_entropy(z[:, :-1].reshape(-1, VOCAB), LABELS[:, 1:].reshape(-1), reduction="none").square().sum()


def everywhere(z, mask):
    return z.logsumexp(-1).square().mean()


def two_values(z, mask):
    return multiplied(z, mask) + z[:, :4].logsumexp(-1).sum()


def read_unmasked_too(z, mask):
    each = log_p(z)
    return (each * mask[:, 1:]).sum() + each.mean()


def of_a_sequence(z, mask):
    """A factor of each sequence, which is 0 for the first; and one that is differentiated."""
    return (log_p(z) * mask[:, :1] * z[:, :-1].logsumexp(-1)).sum()


def last_ones(z, mask):
    return (z[:, -5:-1].log_softmax(-1).gather(-1, IDS[:, -4:, None])[..., 0]).sum()


def written_later(z, mask):
    """What is read before the write has a gradient everywhere."""
    each = log_p(z)
    total = each.sum()
    each[mask[:, 1:] == 0] = 0.0
    return total + each.sum()


WINDOW = torch.zeros_like(ALL)
WINDOW[:, -5:-1] = True
FIRST = torch.zeros_like(ALL)
FIRST[:, :4] = True
EXPECTED = {
    **dict.fromkeys((multiplied, multiplied_late, chosen, filled, written, inside, with_a_late_mask, labels), KNOWN),
    everywhere: ALL,
    two_values: KNOWN | FIRST,
    **dict.fromkeys((read_unmasked_too, written_later), SHIFTED),
    of_a_sequence: SHIFTED & torch.tensor([[False], [True]]),
    last_ones: WINDOW,
}


@pytest.mark.parametrize("loss", EXPECTED)
def test_candidates(loss):
    model, mask = models.Decoder(), (LABELS != -100).float()
    captured = Captured(lambda ids, m: loss(model(ids), m), IDS, mask)
    assert captured.run("align_targets").matched
    found = captured.ctx[Candidates]
    valid, target = execute(captured, found.valid, found.target)
    assert torch.equal(valid, EXPECTED[loss])
    if loss not in (inside, everywhere):
        known = valid & (target != -100)
        wanted = IDS.roll(-1, 1)
        assert known[KNOWN & valid].all() and torch.equal(target[KNOWN & valid], wanted[KNOWN & valid])
    assert (target[~valid] == -100).all()


def test_no_head():
    result = Captured(lambda z: z.log_softmax(-1).square().mean(), torch.randn(2, 3, VOCAB, requires_grad=True))
    assert result.run("find_token_values").cause is Cause.NO_LOSS
