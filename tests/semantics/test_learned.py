"""``scoring="learned"``: what the predictor is trained on, wherever the loss comes from, and what nobody may notice."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, PlainLM, compiled, make_batch, slow_but
from reference import shift
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import RATIO, check_against_reference, complaints, metrics, picks

import cggr_compile
from cggr_compile.ops.predictor import SUMS, fit_reference, new_predictor, predict_reference

BATCH = make_batch(4)
IDS, LABELS = BATCH["input_ids"], BATCH["labels"]
TARGET = shift(LABELS)
LEARNED = {"scoring": "learned", "selection": "importance", "min_tokens_ratio": RATIO}
Loss = Callable[[nn.Module], Tensor]


def predictor(model: Any) -> Tensor:
    (state,) = cggr_compile.runtime(model)._predictors._states.values()
    return state.clone()


def seen(model: nn.Module, block: nn.Module) -> tuple[Tensor, Tensor]:
    """The hidden states behind a block and the logits, of a plain call."""
    found: list[Tensor] = []
    handle = block.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    with torch.no_grad():
        logits = models.Decoder.forward(model, IDS)  # type: ignore[arg-type]
    handle.remove()
    return found[0], logits


def true_norms(logits: Tensor) -> Tensor:
    """Of every position; not those of the operators."""
    difference = logits.softmax(-1) - F.one_hot(TARGET.clamp(min=0), VOCAB)
    return difference.norm(dim=-1)


def check_learning(model: nn.Module, step: Callable[[], Tensor], block: nn.Module, count: int = 3) -> None:
    """Every step leaves the predictor as one that is trained on the rows that carried loss, and draws by the last."""
    hidden, logits = seen(model, block)
    weight = model.lm_head.weight.detach()  # type: ignore[union-attr]
    state = new_predictor(hidden.shape[-1] + weight.shape[1])
    norms, valid = true_norms(logits), TARGET != -100
    for _ in range(count):
        step().backward()
        rows, weights = picks(model)
        index = rows.clamp(min=0)
        own = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        expected = predict_reference(state, hidden, weight, TARGET)
        assert metrics(model)["avg_difficulty"] == pytest.approx(float(expected[valid].mean()), rel=1e-4)
        state = fit_reference(state, own, weight, TARGET.gather(1, index), norms.gather(1, index), weights)
        torch.testing.assert_close(predictor(model), state, atol=2e-5, rtol=1e-3)
    assert metrics(model)["score_correlation"] is not None
    assert all("predictor" not in name for name in model.state_dict())


CASES: dict[str, dict[str, Any]] = {
    "logits": {},
    "fused": {"cross_entropy": "fused"},
    "inductor": {"compiler": "inductor"},
    "inductor, fused": {"compiler": "inductor", "cross_entropy": "fused"},
    "last block": {"router_layers": "full"},
    "topk": {"selection": "topk"},
    "batch": {"scope": "batch"},
    "exact": {"gradient": "exact"},
    "verified": {"verify": 2},
    "context": {"context": 2},
}


@pytest.mark.parametrize("case", slow_but(["fused"], CASES))
def test_it_learns_from_the_loss(case: str) -> None:
    model = PlainLM()
    compiled(model, **{**LEARNED, **CASES[case]})
    check_learning(model, lambda: model(**BATCH).loss, model.blocks[0])
    model.zero_grad()
    if case != "context":
        check_against_reference(model, BATCH, **({"gradient": "exact"} if case == "exact" else {}))
    if case == "verified":
        assert metrics(model)["verify_steps"] == 2


def log_p(logits: Tensor) -> Tensor:
    return logits[:, :-1].log_softmax(-1).gather(-1, LABELS[:, 1:, None].clamp(min=0))[..., 0]


def masked(values: Tensor) -> Tensor:
    mask = LABELS[:, 1:] != -100
    return -(values * mask).sum() / mask.sum()


class Adapted(nn.Module):
    """A head with a LoRA adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(models.HIDDEN, VOCAB, bias=False).requires_grad_(False)
        self.a, self.b = nn.Linear(models.HIDDEN, 2, bias=False), nn.Linear(2, VOCAB, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.b(self.a(x))


def adapted() -> models.Decoder:
    model = models.Decoder(layers=1)
    model.lm_head = Adapted()  # type: ignore[assignment]
    models.randomise(model)
    return model


VALUES: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor], dict[str, Any]]] = {
    "without logits": (lambda: models.Decoder(layers=1), lambda model: masked(log_p(model(IDS))), {}),
    "with logits": (
        lambda: models.Decoder(layers=1),
        lambda model: masked(log_p(model(IDS))),
        {"disable_passes": ["lower_values"]},
    ),
    "adapted head": (
        adapted,
        lambda model: F.cross_entropy(model(IDS)[:, :-1].reshape(-1, VOCAB), LABELS[:, 1:].reshape(-1)),
        {},
    ),
    "adapted head, values": (adapted, lambda model: masked(log_p(model(IDS))), {}),
    "frozen head": (
        lambda: models.Decoder(layers=1, tied=False),
        lambda model: F.cross_entropy(model(IDS)[:, :-1].reshape(-1, VOCAB), LABELS[:, 1:].reshape(-1)),
        {},
    ),
}


@pytest.mark.parametrize("case", slow_but(["without logits", "adapted head"], VALUES))
def test_it_learns_from_values_of_tokens(case: str) -> None:
    make, loss, options = VALUES[case]
    model = make()
    if case == "frozen head":
        model.lm_head.weight.requires_grad_(False)
    step = compiled(lambda: loss(model), **{**LEARNED, **options})
    check_learning(model, step, model.blocks[0])


def test_a_loss_without_labels_draws_at_random() -> None:
    model = models.Decoder(layers=1)

    def entropy() -> Tensor:
        log_q = model(IDS).log_softmax(-1)
        return -(log_q.exp() * log_q).sum(-1).mean()

    step = compiled(entropy, **LEARNED)
    with complaints() as said:
        step().backward()
    assert any("this loss reads no label" in text for text in said), said
    found = metrics(model)
    assert found["matched"] and found["avg_difficulty"] is None and found["score_correlation"] is None
    assert cggr_compile.runtime(model).state_dict()["predictors"] == {}


def test_resuming_and_recomputing() -> None:
    """A state that went through JSON goes on as the run does; a checkpoint's recomputation is no step."""
    model = PlainLM()
    compiled(model, **LEARNED)
    runtime = cggr_compile.runtime(model)
    switch = torch.zeros((), requires_grad=True)
    for _ in range(2):
        model(**BATCH).loss.backward()
    saved = json.loads(json.dumps(runtime.state_dict()))

    def step(switch: Tensor) -> Tensor:
        return model(**BATCH).loss + 0 * switch  # type: ignore[no-any-return]

    def rest(around: bool) -> list[Tensor]:
        found = []
        for _ in range(3):
            loss = checkpoint(step, switch, use_reentrant=False) if around else step(switch)
            found.append(runtime.selected.clone())
            loss.backward()
            found.append(predictor(model))
        return found

    first = rest(False)
    for around in (False, True):
        runtime.load_state_dict(saved)
        assert all(torch.equal(*pair) for pair in zip(first, rest(around), strict=True))
    assert not torch.equal(first[1], first[3])
    runtime.load_state_dict({**saved, "predictors": {}})
    assert not torch.equal(rest(False)[1], first[1])  # the check can fail


def test_one_predictor_on_all_rungs() -> None:
    model = PlainLM()
    compiled(model, **{**LEARNED, "warmup_steps": 4, "ladder": [1.0, 0.5]})
    steps = []
    for _ in range(6):
        model(**BATCH).loss.backward()
        found = cggr_compile.runtime(model)._predictors._states
        steps.append((metrics(model)["ratio"], sum(int(state[SUMS]) for state in found.values())))
    ratios = [ratio for ratio, _ in steps]
    assert ratios[0] == 1.0 and 0.5 in ratios and ratios[-1] == RATIO
    learned = [ratio < 1.0 for ratio in ratios]
    assert [count for _, count in steps] == [sum(learned[: i + 1]) for i in range(6)]


@pytest.mark.slow
def test_several_forwards_have_one_each() -> None:
    model = models.Decoder(layers=1)
    other = make_batch(4, seed=9)["input_ids"]

    def loss(ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids)[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))

    step = compiled(lambda: loss(IDS) + loss(other), **LEARNED)
    for _ in range(2):
        step().backward()
    states = cggr_compile.runtime(model)._predictors._states
    assert [key.forward for key in states] == [0, 1] and not torch.equal(*states.values())
    assert all(state[SUMS] == 2 for state in states.values())


@pytest.mark.slow
def test_measured_ratio() -> None:
    """``min_tokens_ratio="auto"`` measures beside the step: nothing is learned there."""
    model = PlainLM()
    compiled(model, **{**LEARNED, "min_tokens_ratio": "auto", "measure_every": 2, "variance_bound": 1e6})
    steps = []
    for seed in range(8):
        model(**make_batch(4, seed=seed)).loss.backward()
        steps.append(metrics(model)["ratio"])
    assert metrics(model)["added_variance"] is not None and steps[-1] < 1.0
    assert int(predictor(model)[SUMS]) == sum(ratio < 1.0 for ratio in steps)


class Sure(models.Decoder):
    """It is sure of one word, which is every other label."""

    def __init__(self) -> None:
        super().__init__(layers=1, tied=False, bias=True)
        with torch.no_grad():
            self.lm_head.bias[7] = 8.0

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(super().forward(ids).flatten(0, 1), labels.flatten())


def test_it_comes_to_know() -> None:
    model = compiled(Sure(), **LEARNED)
    for seed in range(30):
        ids = make_batch(8, seed=seed)["input_ids"]
        labels = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.5, 7, ids)
        model(ids, labels).backward()
    assert metrics(model)["score_correlation"] > 0.7
    weights = torch.zeros(ids.shape).scatter(1, picks(model).rows.clamp(min=0), picks(model).weights)
    sure = labels == 7
    assert weights[sure & (weights > 0)].mean() > 1.3 * weights[~sure & (weights > 0)].mean()  # drawn less often
