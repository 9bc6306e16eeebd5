"""Several forwards of one model in one graph: each has a selection of its own, and their gradients add up."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from models import SEQ, VOCAB, compiled, make_batch, slow_but
from reference import Picks, Run, assert_same, backward, context_rows, hard_mask, routing, selected_loss, shift
from token_losses import Model, factors, gated
from torch import Tensor, nn
from training import RATIO, complaints, metrics

import cggr_compile
from cggr_compile.causes import Cause

CHOSEN, REJECTED = make_batch(2, SEQ), make_batch(2, 12, seed=5)
OTHER = make_batch(3, 12, seed=7)
MICRO = [make_batch(1, 10, seed=seed) for seed in range(3)]
Logits = Callable[[Tensor], Tensor]
CrossEntropy = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


def log_p(logits: Tensor, labels: Tensor) -> Tensor:
    """Of every sequence."""
    known = labels[:, 1:] != -100
    each = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return (each * known).sum(-1)


def preference(forward: Logits, ce: CrossEntropy) -> Tensor:
    """DPO; the reference is a constant for each pair."""
    chosen, rejected = (log_p(forward(batch["input_ids"]), batch["labels"]) for batch in (CHOSEN, REJECTED))
    return -F.logsigmoid(0.1 * (chosen - rejected - torch.tensor([0.5, -2.0]))).mean()


def two_batches(forward: Logits, ce: CrossEntropy) -> Tensor:
    return sum(w * ce(forward(b["input_ids"]), b["labels"]) for w, b in ((1.0, CHOSEN), (0.3, OTHER)))


def preference_and_supervised(forward: Logits, ce: CrossEntropy) -> Tensor:
    """RPO: the cross-entropy of the chosen completions beside."""
    chosen, rejected = forward(CHOSEN["input_ids"]), forward(REJECTED["input_ids"])
    margin = log_p(chosen, CHOSEN["labels"]) - log_p(rejected, REJECTED["labels"])
    flat = chosen[:, :-1].reshape(-1, VOCAB), CHOSEN["labels"][:, 1:].reshape(-1)
    return F.cross_entropy(*flat) - F.logsigmoid(0.1 * margin).mean()


def values_beside_cross_entropy(forward: Logits, ce: CrossEntropy) -> Tensor:
    logits = forward(CHOSEN["input_ids"])
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    return ce(forward(OTHER["input_ids"]), OTHER["labels"]) - 0.1 * entropy.square().mean()


def micro_batches(forward: Logits, ce: CrossEntropy) -> Tensor:
    return sum(ce(forward(batch["input_ids"]), batch["labels"]) for batch in MICRO) / len(MICRO)


LOSSES = (preference, two_batches, preference_and_supervised, values_beside_cross_entropy, micro_batches)
QUICK = (two_batches, preference_and_supervised, values_beside_cross_entropy)


def picks_of(model: nn.Module) -> list[Picks]:
    runtime = cggr_compile.runtime(model)
    return [
        Picks(rows.clone(), weights.clone()) for rows, weights in zip(runtime.selected, runtime.weights, strict=True)
    ]


def expected(model: Any, loss: Any, picks: list[Picks], context: Any = None, **options: Any) -> Run:
    """The user's formula, run eagerly: every forward with its own positions."""
    how = options.get("gradient", "routed"), options.get("kv_gradient", "project")
    own: dict[int, Picks] = {}
    kept = []

    def forward(ids: Tensor) -> Tensor:
        rows, weights = picks[len(own)]
        size = ids.shape[1]
        hard = hard_mask(rows, size)
        if context is not None:
            hard = hard | context_rows(rows, *context[len(own)], size)
        weigh = factors(picks[len(own)], size).sqrt() if "kv_weight" in options else None
        with routing(model, hard, *how, weigh):
            logits = gated(model(ids), factors(Picks(rows, weights), size))
        own[id(logits)] = picks[len(own)]
        kept.append(logits)
        return logits

    def ce(logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of the selected positions; its gradient is that of their logits."""
        value = selected_loss(logits.detach(), shift(labels), own[id(logits)])
        if not (labels[:, 1:] != -100).any():
            return value
        found = cross_entropy(logits, labels)
        return value + found - found.detach()

    return backward(model, loss(forward, ce))


def run(loss: Any, model: Any = None, **options: Any) -> tuple[Any, Run]:
    """A model, and its gradients under the compiled step."""
    model = model or Model()
    step = compiled(lambda: loss(model, cross_entropy), **{"min_tokens_ratio": RATIO, "context": 0, **options})
    got = backward(model, step())
    assert metrics(model)["matched"], metrics(model)
    return model, got


@pytest.mark.parametrize("loss", slow_but(QUICK, LOSSES))
def test_losses(loss: Any) -> None:
    model, got = run(loss)
    picks = picks_of(model)
    assert_same(got, expected(model, loss, picks))
    figures = metrics(model)
    assert figures["tokens_selected"] == sum(int((p.rows >= 0).sum()) for p in picks) == figures["gradient_tokens"]
    assert figures["tokens_selected"] < figures["tokens_total"]


OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"gradient": "exact"},
    "weighed": {"kv_weight": "1/sqrt(p)"},
    "stop": {"kv_gradient": "stop"},
    "topk": {"selection": "topk", "scoring": "loss"},
    "batch": {"scope": "batch"},
    "labels": {"selection": "labels", "max_selected": 4},
    "row_sparse off": {"row_sparse": False},
    "inductor": {"compiler": "inductor"},
    "fused": {"cross_entropy": "fused"},
    "full router": {"router_layers": "full"},
}


@pytest.mark.parametrize("name", slow_but(["weighed"], OPTIONS))
@pytest.mark.parametrize("loss", [preference_and_supervised, pytest.param(two_batches, marks=pytest.mark.slow)])
def test_options(loss: Any, name: str) -> None:
    model, got = run(loss, **OPTIONS[name])
    assert_same(got, expected(model, loss, picks_of(model), **OPTIONS[name]))
    if name == "labels":
        assert metrics(model)["labels_overflow"] > 0


def test_ratio_of_one_is_the_users_loss() -> None:
    model = Model()
    got = backward(model, compiled(lambda: preference_and_supervised(model, cross_entropy), min_tokens_ratio=1.0)())
    assert_same(got, backward(model, preference_and_supervised(model, cross_entropy)))


def test_unbiased() -> None:
    """Of every pair of positions that may be selected, all equally likely: the mean gradient is the dense one."""
    model = Model()
    chosen, rejected = CHOSEN["input_ids"][:1, 4:7], REJECTED["input_ids"][1:, :3]

    def loss() -> Tensor:
        return -F.logsigmoid(0.5 * (log_p(model(chosen), chosen) - log_p(model(rejected), rejected))).mean()

    options = {"selection": "random", "scoring": "random", "gradient": "exact"}
    step = compiled(loss, min_tokens_ratio=0.33, **options)
    seen: Counter[tuple[int, ...]] = Counter()
    runs: dict[tuple[int, ...], Run] = {}
    for _ in range(64):
        got = backward(model, step())
        drawn = tuple(int(picks.rows) for picks in picks_of(model))
        seen[drawn] += 1
        runs[drawn] = got
    assert len(seen) == 4 and min(seen.values()) > 6, seen
    dense = backward(model, loss())
    mean = {name: sum(run.grads[name] for run in runs.values()) / 4 for name in dense.grads}
    assert_same(Run(dense.loss, mean), dense)
    with pytest.raises(AssertionError):
        assert_same(next(iter(runs.values())), dense)


@pytest.mark.parametrize("loss", [two_batches, pytest.param(preference, marks=pytest.mark.slow)])
def test_no_labels_in_one_forward(loss: Any) -> None:
    model = Model()
    labels = CHOSEN["labels"].clone()

    def step(labels: Tensor) -> Tensor:
        with_labels = {"input_ids": CHOSEN["input_ids"], "labels": labels}
        if loss is preference:
            chosen = log_p(model(CHOSEN["input_ids"]), labels)
            return -F.logsigmoid(chosen - log_p(model(OTHER["input_ids"][:2]), OTHER["labels"][:2])).mean()
        return sum(cross_entropy(model(b["input_ids"]), b["labels"]) for b in (with_labels, OTHER))

    train = compiled(step, min_tokens_ratio=RATIO, context=0)
    backward(model, train(labels))
    got = backward(model, train(torch.full_like(labels, -100)))
    picks = picks_of(model)
    assert (picks[0].rows == -1).all() and (picks[1].rows >= 0).any()
    assert metrics(model)["tokens_total"] == int((OTHER["labels"][: len(picks[1].rows), 1:] != -100).sum())
    if loss is two_batches:
        only = lambda forward, ce: ce(forward(OTHER["input_ids"]), OTHER["labels"])  # noqa: E731
        assert_same(got, expected(model, only, picks[1:]))
    else:
        assert all(torch.isfinite(grad).all() for grad in got.grads.values())


@pytest.mark.parametrize("loss", slow_but([values_beside_cross_entropy], LOSSES))
def test_verified(loss: Any) -> None:
    model, _ = run(loss, verify=True)
    verification = cggr_compile.runtime(model).reports[-1].verification
    assert verification.steps == 1 and verification.captured_error < 1e-5 and not verification.note
    assert metrics(model)["verify_max_error"] < 1e-5


def test_verify_finds_a_mistake(monkeypatch: Any) -> None:
    """In the second forward alone."""
    from cggr_compile import captured_reference

    init = captured_reference._CrossEntropy.__init__

    def wrong(self: Any, site: Any, begin: int, selected: Tensor, weights: Tensor) -> None:
        init(self, site, begin, selected, weights * (1.5 if selected.shape[0] == 3 else 1.0))

    monkeypatch.setattr(captured_reference._CrossEntropy, "__init__", wrong)
    with pytest.raises(cggr_compile.VerificationError, match="captured"):
        run(two_batches, verify=True)


def test_labels_and_context() -> None:
    """``auto`` decides for all forwards together; each has slots, and context in front of its own positions."""
    batches = []
    for batch, last in ((CHOSEN, 4), (OTHER, 2)):
        labels = torch.full_like(batch["labels"], -100)
        labels[:, -last:] = batch["input_ids"][:, -last:]
        batches.append({"input_ids": batch["input_ids"], "labels": labels})

    def loss(forward: Logits, ce: CrossEntropy) -> Tensor:
        return sum(ce(forward(batch["input_ids"]), batch["labels"]) for batch in batches)

    with complaints() as heard:
        model, got = run(loss, context=2)
    report = cggr_compile.runtime(model).reports[0]
    assert report.selection == "labels" and report.record("choose_selection").details["slots"] == [4, 6, 2, 4]
    assert any("4 of 16 slots carry loss, 6 gradient; 2 of 12 slots carry loss, 4 gradient" in text for text in heard)
    assert metrics(model)["gradient_tokens"] == 2 * 6 + 3 * 4 and metrics(model)["labels_overflow"] == 0
    assert_same(got, expected(model, loss, picks_of(model), context=[(2, 6), (2, 4)]))


def test_frozen_embedding_and_reference() -> None:
    """As adapters train: what the forwards begin with has no gradient, and a third forward none at all."""
    model = Model()
    frozen = copy.deepcopy(model).requires_grad_(False)
    model.wte.requires_grad_(False)
    model.wpe.requires_grad_(False)

    def loss(forward: Logits, ce: CrossEntropy) -> Tensor:
        margin = torch.zeros(2)
        for sign, batch in ((1, CHOSEN), (-1, REJECTED)):
            with torch.no_grad():
                reference = log_p(frozen(batch["input_ids"]), batch["labels"])
            margin = margin + sign * (log_p(forward(batch["input_ids"]), batch["labels"]) - reference)
        return -F.logsigmoid(0.1 * margin).mean()

    model, got = run(loss, model)
    assert_same(got, expected(model, loss, picks_of(model)))
    assert "2 forwards" in cggr_compile.runtime(model).reports[-1].record("find_forwards").reason


def test_values_that_are_returned() -> None:
    """The caller computes the loss; logits of both forwards come back empty."""
    model = Model()

    def step() -> tuple[Tensor, ...]:
        chosen, rejected = model(CHOSEN["input_ids"]), model(REJECTED["input_ids"])
        return log_p(chosen, CHOSEN["labels"]), log_p(rejected, REJECTED["labels"]), chosen, rejected

    def outside(chosen: Tensor, rejected: Tensor) -> Tensor:
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    train = compiled(step, min_tokens_ratio=RATIO, context=0)
    *values, chosen, rejected = train()
    got = backward(model, outside(*values))
    assert chosen.shape == rejected.shape == (2, 0, VOCAB)

    def loss(forward: Logits, ce: CrossEntropy) -> Tensor:
        return outside(*(log_p(forward(b["input_ids"]), b["labels"]) for b in (CHOSEN, REJECTED)))

    assert_same(got, expected(model, loss, picks_of(model)))
    kinds = cggr_compile.runtime(model).reports[-1].record("classify_outputs").details
    assert all(set(found) == {"value", "logits"} for found in kinds.values()), kinds


def test_a_ladder_of_ratios() -> None:
    """At ratio 1.0 the figures of both routers decide together."""
    model = Model()
    options = {"dynamic_threshold": True, "warmup_steps": 2, "context": 0}
    step = compiled(lambda: two_batches(model, cross_entropy), min_tokens_ratio=RATIO, **options)
    dense = backward(model, two_batches(model, cross_entropy))
    assert_same(backward(model, step()), dense)
    figures = metrics(model)
    assert figures["ratio"] == 1.0 and figures["tokens_total"] == figures["tokens_selected"] == 56
    assert cggr_compile.runtime(model).selected is None
    for _ in range(3):
        got = backward(model, step())
    assert metrics(model)["ratio"] < 1.0
    assert_same(got, expected(model, two_batches, picks_of(model)))


def test_train_step() -> None:
    """A step of the user's that trains: the loss falls."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)

    @cggr_compile.train_step(min_tokens_ratio=0.5, compiler="eager", fallback="error")
    def step(model, optimizer, chosen, rejected):
        loss = -F.logsigmoid(0.1 * (log_p(model(chosen), chosen) - log_p(model(rejected), rejected))).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    ids = CHOSEN["input_ids"], REJECTED["input_ids"]
    losses = [float(step(model, optimizer, *ids)) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.01 and metrics(model)["step"] == 6


@pytest.mark.slow
def test_two_models() -> None:
    """Which share nothing: each has a selection, and the figures are those of both."""
    model = nn.ModuleDict({"one": Model(), "other": models.randomise(Model(), seed=9)})

    def loss(first: Logits, second: Logits, ce: CrossEntropy) -> Tensor:
        return ce(first(CHOSEN["input_ids"]), CHOSEN["labels"]) + ce(second(OTHER["input_ids"]), OTHER["labels"])

    step = compiled(lambda: loss(model["one"], model["other"], cross_entropy), min_tokens_ratio=RATIO, context=0)
    got = backward(model, step())
    picks = picks_of(model)
    for name, own, batch in zip(model, picks, (CHOSEN, OTHER), strict=True):
        want = expected(model[name], lambda forward, ce, b=batch: ce(forward(b["input_ids"]), b["labels"]), [own])
        assert_same(Run(want.loss, {key: got.grads[f"{name}.{key}"] for key in want.grads}), want)


def both_logits(forward: Logits, ce: CrossEntropy) -> Tensor:
    """R-drop: each forward's distribution against the other's."""
    one, other = (forward(CHOSEN["input_ids"]).log_softmax(-1) for _ in range(2))
    return F.kl_div(one, other, log_target=True, reduction="none").sum(-1).mean()


def one_cross_entropy(forward: Logits, ce: CrossEntropy) -> Tensor:
    logits = torch.cat(
        [forward(CHOSEN["input_ids"]), forward(OTHER["input_ids"][:, :SEQ])[:2].repeat(1, 2, 1)[:, :SEQ]]
    )
    return ce(logits, torch.cat([CHOSEN["labels"]] * 2))


def each_others_teacher(forward: Logits, ce: CrossEntropy) -> Tensor:
    one, other = (forward(ids).log_softmax(-1) for ids in (CHOSEN["input_ids"], CHOSEN["input_ids"].flip(1)))
    pairs = (one, other.detach()), (other, one.detach())
    return sum(F.kl_div(*pair, log_target=True, reduction="none").sum(-1).mean() for pair in pairs)


@pytest.mark.parametrize("loss", [both_logits, one_cross_entropy, each_others_teacher])
def test_logits_of_both_together_stay_dense(loss: Any) -> None:
    model = models.Decoder(layers=1)
    got = backward(model, compiled(lambda: loss(model, cross_entropy), min_tokens_ratio=RATIO, fallback="silent")())
    report = cggr_compile.runtime(model).reports[-1]
    assert report.cause is Cause.SEVERAL_FORWARDS and "combines the logits of several forwards" in report.reason
    assert_same(got, backward(model, loss(model, cross_entropy)))


def test_all_or_none() -> None:
    """A second forward that cannot be rewritten leaves the first one dense, too."""
    model = Model()

    def loss(forward: Logits, ce: CrossEntropy) -> Tensor:
        z = forward(OTHER["input_ids"])
        mixed = F.cross_entropy(z.cumsum(1).flatten(0, 1), OTHER["input_ids"].flatten())
        return ce(forward(CHOSEN["input_ids"]), CHOSEN["labels"]) + mixed

    got = backward(model, compiled(lambda: loss(model, cross_entropy), min_tokens_ratio=RATIO, fallback="silent")())
    assert cggr_compile.runtime(model).reports[-1].cause is Cause.UNSUPPORTED_LOSS
    assert_same(got, backward(model, loss(model, cross_entropy)))
