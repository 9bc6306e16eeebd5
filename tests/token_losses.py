"""Losses of per-token values as users write them, and what the gradient of each has to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import torch
import torch.nn.functional as F
from models import HIDDEN, SEQ, VOCAB, make_batch
from reference import Picks, Run, backward, hard_mask, routing
from torch import Tensor, nn

import cggr_compile

BATCH = make_batch()
IDS, LABELS = BATCH["input_ids"], BATCH["labels"]
TARGET = F.pad(LABELS, (0, 1), value=-100)[:, 1:]
NEXT = LABELS[:, 1:].clamp_min(0)
MASK = (LABELS[:, 1:] != -100).float()
TEACHER = torch.randn(2, SEQ, VOCAB, generator=torch.Generator().manual_seed(7))
OLD = torch.linspace(-6, -4, 2 * (SEQ - 1)).view(2, SEQ - 1)
ADVANTAGE = torch.tensor([1.0, -0.5])[:, None]

# One gradient for every logit: Gate(logits, first position) -> logits
Gate = Callable[..., Tensor]
LOSSES: dict[str, Callable[[Tensor], Any]] = {}
HEADS: dict[str, Callable[[Any, Gate], Any]] = {}


def loss(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Registers a function of the logits."""
    LOSSES[function.__name__] = function
    return function


def heads(function: Callable[[Any, Gate], Any]) -> Callable[[Any, Gate], Any]:
    """Registers a function of a model, which calls the head itself."""
    HEADS[function.__name__] = function
    return function


def log_p(z: Tensor) -> Tensor:
    return F.log_softmax(z[:, :-1], -1).gather(-1, NEXT[..., None])[..., 0]


def flat(z: Tensor) -> tuple[Tensor, Tensor]:
    return z[:, :-1].reshape(-1, VOCAB), LABELS[:, 1:].reshape(-1)


def masked(value: Tensor, mask: Tensor = MASK) -> Tensor:
    return (value * mask).sum() / mask.sum()


@loss
def gathered(z):
    return -masked(log_p(z))


@loss
def logits_minus_logsumexp(z):
    z = z[:, :-1]
    return -masked(z.gather(-1, NEXT[..., None]).squeeze(-1) - z.logsumexp(-1))


@loss
def sequence_by_sequence(z):
    """As TRL does where the logits are float32."""
    z = z[:, :-1]
    picked = torch.gather(z, dim=-1, index=NEXT.unsqueeze(-1))
    total = torch.stack([torch.logsumexp(row, dim=-1) for row in z])
    return -masked((picked - total.unsqueeze(-1)).squeeze(-1))


@loss
def loop_over_sequences(z):
    """As TRL does where they are not."""
    rows = [F.log_softmax(r, -1).gather(-1, t[:, None]).squeeze(-1) for r, t in zip(z[:, :-1], NEXT, strict=True)]
    return -masked(torch.stack(rows))


@loss
def entropy_in_pieces(z):
    """As TRL does: pieces that end inside of sequences."""
    found = []
    for piece in z.reshape(-1, VOCAB).split(5, dim=0):
        logs = F.log_softmax(piece, -1)
        found.append(-(torch.exp(logs) * logs).sum(-1))
    return torch.cat(found).reshape(z.shape[:-1])[:, :-1].mul(MASK).sum()


@loss
def by_arange(z):
    logs = F.log_softmax(z[:, :-1].reshape(-1, VOCAB), -1)
    return -(logs[torch.arange(logs.shape[0]), NEXT.reshape(-1)] * MASK.reshape(-1)).sum()


@loss
def nll(z):
    return F.nll_loss(F.log_softmax(z[:, :-1].reshape(-1, VOCAB), -1), flat(z)[1], reduction="none").square().sum()


@loss
def weighted_tokens(z):
    each = F.cross_entropy(*flat(z), reduction="none")
    weight = torch.linspace(0.5, 1.5, each.numel())
    return (each * weight).sum() / weight.sum()


@loss
def classes_in_the_middle(z):
    return F.cross_entropy(z.transpose(1, 2), TARGET, reduction="none").square().sum(-1).sqrt().mean()


@loss
def class_weights(z):
    return F.cross_entropy(*flat(z), weight=torch.linspace(0.5, 1.5, VOCAB), label_smoothing=0.1)


@loss
def soft_targets(z):
    return F.cross_entropy(z.flatten(0, 1), (0.9 * F.one_hot(IDS, VOCAB) + 0.1 / VOCAB).flatten(0, 1))


@loss
def z_loss(z):
    return F.cross_entropy(*flat(z)) + 1e-2 * z.logsumexp(-1).square().mean()


@loss
def masked_z_loss(z):
    known = LABELS[:, 1:] != -100
    return F.cross_entropy(*flat(z)) + 1e-2 * (z[:, :-1].logsumexp(-1).square() * known).sum() / known.sum()


@loss
def logit_penalty(z):
    return F.cross_entropy(*flat(z)) + 1e-2 * z.square().mean()


@loss
def label_smoothing_outside(z):
    """As transformers' LabelSmoother does."""
    logs, labels = -F.log_softmax(z[..., :-1, :], -1), LABELS[..., 1:].unsqueeze(-1)
    padding = labels.eq(-100)
    one = logs.gather(-1, labels.clamp(min=0)).masked_fill(padding, 0.0)
    every = logs.sum(-1, keepdim=True, dtype=torch.float32).masked_fill(padding, 0.0)
    count = padding.numel() - padding.long().sum()
    return 0.9 * one.sum() / count + 0.1 * every.sum() / (count * VOCAB)


@loss
def distillation(z):
    kind = {"reduction": "none", "log_target": True}
    each = F.kl_div(F.log_softmax(z / 2, -1), F.log_softmax(TEACHER / 2, -1), **kind).sum(-1)
    return 4 * masked(each[:, :-1])


@loss
def batchmean(z):
    return F.kl_div(F.log_softmax(z, -1).flatten(0, 1), TEACHER.softmax(-1).flatten(0, 1), reduction="batchmean")


@loss
def jensen_shannon(z):
    """As in generalised knowledge distillation."""
    own, other, beta = F.log_softmax(z, -1), F.log_softmax(TEACHER, -1), torch.tensor(0.3)
    mixed = torch.logsumexp(torch.stack([own + torch.log1p(-beta), other + torch.log(beta)]), dim=0)
    one = F.kl_div(mixed, other, reduction="none", log_target=True)
    two = F.kl_div(mixed, own, reduction="none", log_target=True)
    return masked((beta * one + (1 - beta) * two).sum(-1)[:, :-1])


@loss
def two_shifts(z):
    return F.cross_entropy(*flat(z)) + 0.5 * F.cross_entropy(z[:, :-2].reshape(-1, VOCAB), LABELS[:, 2:].reshape(-1))


@loss
def sigmoid_cap(z):
    return F.cross_entropy(*flat(15 * torch.sigmoid(z / 7.5)))


@loss
def tanh_cap(z):
    return -masked(log_p(15 * torch.tanh(z / 15)))


@loss
def temperature_of_data(z):
    return F.cross_entropy(*flat(z / (1 + LABELS[:, :1, None].float().abs() / 100)))


@loss
def clipped_policy(z):
    """GRPO."""
    ratio = (log_p(z) - OLD).exp()
    each = -torch.min(ratio * ADVANTAGE, ratio.clamp(0.8, 1.2) * ADVANTAGE)
    return ((each * MASK).sum(-1) / MASK.sum(-1)).mean()


@loss
def preference(z):
    """DPO, masked in place as TRL does."""
    each = log_p(z)
    each[MASK == 0] = 0.0
    chosen, rejected = each.sum(-1).chunk(2, 0)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


@loss
def odds_ratio(z):
    """ORPO: a cross-entropy of half of the batch beside."""
    chosen, rejected = ((log_p(z) * MASK).sum(-1) / MASK.sum(-1)).chunk(2, 0)
    odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return F.cross_entropy(z[:1, :-1].reshape(-1, VOCAB), LABELS[:1, 1:].reshape(-1)) - 0.1 * F.logsigmoid(odds).mean()


@loss
def dynamic_fine_tuning(z):
    each = F.cross_entropy(*flat(z), reduction="none")
    return (each * torch.exp(-each.detach())).sum() / MASK.sum()


@loss
def top_entropy(z):
    """Tokens of high entropy only: a mask that depends on the logits."""
    logs = F.log_softmax(z[:, :-1], -1)
    entropy = -(logs.exp() * logs).sum(-1).detach()
    mask = MASK * (entropy >= torch.quantile(entropy.flatten(), 0.5))
    return -(log_p(z) * mask).sum() / mask.sum()


@loss
def normalised_over_tokens(z):
    each = F.cross_entropy(*flat(z), reduction="none")
    return (each * (each / each.sum()).softmax(0)).sum()


@loss
def single_sequences(z):
    return sum(F.cross_entropy(z[b, 2 + b : 12], IDS[b, 3 + b : 13]) for b in range(2))


@loss
def last_position(z):
    return F.cross_entropy(z[:, -1], IDS[:, 0])


@loss
def softmax_by_hand(z):
    z = z[:, :-1]
    e = (z - z.detach().amax(-1, keepdim=True)).exp()
    return -masked((e / e.sum(-1, keepdim=True)).gather(-1, NEXT[..., None])[..., 0].log())


@loss
def padded_vocabulary(z):
    z = z[:, :-1, :100] / 1.5
    z /= 2
    return -masked(z.log_softmax(-1).gather(-1, NEXT.clamp(max=99)[..., None])[..., 0])


@loss
def returned_values(z):
    """Several, of which the caller computes the loss."""
    logs = z[:, :-1].log_softmax(-1)
    return logs.gather(-1, NEXT[..., None])[..., 0], -(logs.exp() * logs).sum(-1)


@heads
def chunked_sums(model, gate):
    """As torchtune does."""
    total, begin, hidden = 0, 0, model.hidden(IDS)
    for piece, labels in zip(hidden.chunk(4, dim=1), TARGET.chunk(4, dim=1), strict=True):
        z = gate(model.lm_head(piece), begin)
        begin += piece.shape[1]
        total = total + F.cross_entropy(z.float().reshape(-1, VOCAB), labels.reshape(-1), reduction="sum")
    return total / (TARGET != -100).sum()


@heads
def chunked_values(model, gate):
    """As litgpt does: uneven chunks, the last one shortened by the shift."""
    logits, begin = [], 0
    for piece in model.hidden(IDS).split(5, dim=1):
        logits.append(gate(model.lm_head(piece), begin))
        begin += piece.shape[1]
    logits[-1] = logits[-1][..., :-1, :]
    labels = LABELS[..., 1:].split(5, dim=1)
    each = [
        F.cross_entropy(z.reshape(-1, VOCAB), t.reshape(-1), reduction="none")
        for z, t in zip(logits, labels, strict=False)  # nothing is left of the last chunk
    ]
    count = (LABELS[..., 1:] != -100).sum()
    return torch.cat(each).sum() / count.maximum(torch.ones_like(count))


@heads
def joined_logits(model, gate):
    pieces = model.hidden(IDS).split(4, dim=1)
    return -masked(log_p(torch.cat([gate(model.lm_head(piece), 4 * i) for i, piece in enumerate(pieces)], dim=1)))


@heads
def logits_to_keep(model, gate):
    z = gate(model.lm_head(model.hidden(IDS)[:, -7:, :]), SEQ - 7)[:, :-1]
    return -F.log_softmax(z, -1).gather(-1, IDS[:, -6:, None]).sum()


@heads
def further_head(model, gate):
    """Multi-token prediction: another head, with a layer of its own."""
    hidden = model.hidden(IDS)
    z, later = gate(model.lm_head(hidden)), gate(model.second(hidden + F.silu(model.layer(hidden))))
    return F.cross_entropy(*flat(z)) + 0.3 * F.cross_entropy(
        later[:, :-2].reshape(-1, VOCAB), LABELS[:, 2:].reshape(-1)
    )


@heads
def against_a_reference(model, gate):
    """A second forward without gradient: a KL penalty."""
    with torch.no_grad():
        reference = log_p(model.lm_head(model.hidden(IDS.flip(1))))
    difference = reference - log_p(gate(model.lm_head(model.hidden(IDS))))
    return masked(difference.exp() - difference - 1) + masked(difference)


@heads
def critic(model, gate):
    """A value of every position, from the same hidden state, is no part of it."""
    hidden = model.hidden(IDS)
    return -masked(log_p(gate(model.lm_head(hidden)))) + 0.1 * (model.layer(hidden)[..., 0] - 1).square().mean()


@heads
def head_without_logits(model, gate):
    """The operator that computes values of a head, where a user calls it."""
    hidden = model.hidden(IDS)
    if gate is open_gate:
        found = cggr_compile.token_log_probs(
            hidden, model.lm_head.weight, TARGET, temperature=0.8, outputs=("log_prob", "entropy")
        )
        log_prob, entropy = found.log_prob, found.entropy
    else:
        logs = (gate(model.lm_head(hidden)) / 0.8).log_softmax(-1)
        log_prob = logs.gather(-1, TARGET.clamp_min(0)[..., None])[..., 0] * (TARGET != -100)
        entropy = -(logs.exp() * logs).sum(-1) * (TARGET != -100)
    return -(log_prob * ADVANTAGE).sum() - 0.1 * entropy.square().mean()


class Model(models.Decoder):
    """One layer; a second head, and a layer in front of it."""

    def __init__(self) -> None:
        super().__init__(layers=1, fused=False, tied=False)
        self.layer, self.second = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, VOCAB)
        models.randomise(self)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.ln_f(x)


def open_gate(logits: Tensor, begin: int = 0) -> Tensor:
    return logits


def factors(picks: Picks, size: int = SEQ) -> Tensor:
    """What the gradient of every position is multiplied with, float32 [B, S]: its weight, 0 for one not selected."""
    found = torch.zeros(len(picks.rows), size + 1)
    return found.scatter(1, torch.where(picks.rows < 0, size, picks.rows), picks.weights)[:, :size]


def gated(logits: Tensor, factor: Tensor, begin: int = 0) -> Tensor:
    """Logits [B, S', V], from position ``begin`` on, with the gradient of some positions."""
    factor = factor[:, begin : begin + logits.shape[1], None]
    return logits.detach() + (logits - logits.detach()) * factor


def outside(result: Any) -> Tensor:
    """The loss, where the graph returns values."""
    return result if isinstance(result, Tensor) else -masked(result[0]) - 0.01 * result[1].mean()


def expected(model: nn.Module, function: Callable[[Gate], Any], picks: Picks, gradient: str = "routed") -> Run:
    """The user's formula, run eagerly, with the gradient of the logits at the selected rows."""
    factor = factors(picks)
    with routing(model, hard_mask(picks.rows, SEQ), gradient, "project"):
        return backward(model, outside(function(lambda z, begin=0: gated(z, factor, begin))))


def picks_of(model: nn.Module) -> Picks:
    runtime = cggr_compile.runtime(model)
    return Picks(runtime.selected.clone(), runtime.weights.clone())
