"""Which positions are selected, and that nothing else draws from the same randomness."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from models import SEQ, PlainLM, compiled, family, make_batch, slow_but
from reference import backward, candidates, difficulty, eager_call, hardest, hf_reference, shift, worst
from torch import Tensor
from training import RATIO, SLOTS, check_against_reference, metrics, padded, picks, selected, small

import cggr_compile


@pytest.mark.slow
def test_seed_and_steps() -> None:
    def rows(seed: int, steps: int = 4) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(seed + 17 * steps)  # the global generator plays no part
        model, batch = PlainLM(), make_batch(4)
        compiled(model, min_tokens_ratio=RATIO, seed=seed)
        out = []
        for _ in range(steps):
            backward(model, model(**batch).loss)
            out.append(selected(model))
        return out

    first, again, other = rows(1), rows(1, 5), rows(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again[:4], strict=True))
    assert not torch.equal(first[0], other[0])
    assert len({tuple(p.flatten().tolist()) for p in first}) == len(first)
    assert len({tuple(row) for row in first[0].tolist()}) > 1, "every sequence got the same positions"


def test_random_selection_is_uniform() -> None:
    model, batch = PlainLM(), make_batch(8, ignored=False)
    compiled(model, min_tokens_ratio=RATIO, scoring="random")
    counts, rounds = torch.zeros(SEQ), 60
    for _ in range(rounds):
        model(**batch)
        counts += torch.bincount(selected(model).flatten(), minlength=SEQ)
    assert counts[-1] == 0
    expected = rounds * 8 * SLOTS / (SEQ - 1)
    # five standard deviations of a binomial
    assert (counts[:-1] - expected).abs().max() < 5 * math.sqrt(expected), counts


@pytest.mark.slow
def test_runtime_state_resumes_selection() -> None:
    model, batch = PlainLM(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, seed=9)
    for _ in range(3):
        backward(model, model(**batch).loss)
    state = copy.deepcopy(cggr_compile.runtime(model).state_dict())
    backward(model, model(**batch).loss)
    want = selected(model)
    backward(model, model(**batch).loss)
    assert not torch.equal(selected(model), want)

    cggr_compile.runtime(model).load_state_dict(state)
    backward(model, model(**batch).loss)
    assert torch.equal(selected(model), want)

    torch._dynamo.reset()
    fresh = PlainLM()
    compiled(fresh, min_tokens_ratio=RATIO, seed=9)
    cggr_compile.runtime(fresh).load_state_dict(state)
    backward(fresh, fresh(**batch).loss)
    assert torch.equal(selected(fresh), want)


def test_manual_advance() -> None:
    model, batch = PlainLM(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, advance="manual")
    backward(model, model(**batch).loss)
    first = selected(model)
    backward(model, model(**batch).loss)
    assert torch.equal(selected(model), first) and metrics(model)["step"] == 0
    cggr_compile.runtime(model).step()
    backward(model, model(**batch).loss)
    assert not torch.equal(selected(model), first) and metrics(model)["step"] == 1


@pytest.mark.parametrize("layers", [pytest.param("full", marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("scoring", slow_but(["loss", "combined"], ["entropy", "margin", "loss", "combined"]))
def test_topk_selects_the_hardest(scoring: str, layers: str | int) -> None:
    model, batch = family("gemma2"), padded("right", size=3)
    batch["labels"][1, 3:8] = -100
    compiled(
        model, min_tokens_ratio=RATIO, selection="topk", scoring=scoring, router_layers=layers, router_precision="model"
    )
    check_against_reference(model, batch)

    target = shift(batch["labels"])
    valid = candidates(target)
    with torch.no_grad():
        output = eager_call(
            model, batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        )
        logits = output.logits
        if layers != "full":
            logits = model.lm_head(model.model.norm(output.hidden_states[layers]))
            cap = model.config.final_logit_softcapping
            logits = cap * torch.tanh(logits / cap)
    scores = difficulty(logits, target, scoring)
    assert torch.equal(selected(model), hardest(scores, valid, SLOTS))

    # and the metrics describe the candidates
    top = logits.double().softmax(-1).amax(-1)
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
    got = metrics(model)
    assert got["scoring"] == scoring and got["selection"] == "topk"
    assert got["avg_confidence"] == pytest.approx(float(top[valid].mean()), rel=1e-4)
    assert got["avg_entropy"] == pytest.approx(float(entropy[valid].mean()), rel=1e-4)
    assert got["avg_difficulty"] == pytest.approx(float(scores[valid].mean()), rel=1e-4)


@pytest.mark.parametrize("selection", ["topk", "fixed_quota"])
def test_fixed_quota_is_topk_by_its_older_name(selection: str) -> None:
    model, batch = PlainLM(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, selection=selection, router_layers="full")
    check_against_reference(model, batch)
    target = shift(batch["labels"])
    with torch.no_grad():
        scores = difficulty(eager_call(model, batch["input_ids"]).logits, target, "combined")
    assert torch.equal(selected(model), hardest(scores, candidates(target), SLOTS))


def test_metrics() -> None:
    model, batch = PlainLM(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    model(**batch)
    got = metrics(model)
    expected = {"step", "token_ratio", "tokens_selected", "tokens_total", "avg_confidence", "avg_entropy"}
    expected |= {"avg_difficulty", "scoring", "selection", "matched", "fallback_reason"}
    assert expected <= set(got)
    valid = candidates(shift(batch["labels"]))
    assert got["tokens_selected"] == int((selected(model) >= 0).sum())
    assert got["tokens_total"] == int(valid.sum())
    assert got["token_ratio"] == pytest.approx(got["tokens_selected"] / got["tokens_total"])
    assert got["step"] == 1 and got["matched"] is True and not got["fallback_reason"]
    assert (got["scoring"], got["selection"]) == ("combined", "importance")


def test_dropout_model_trains_and_selection_leaves_the_global_generator_alone() -> None:
    model, batch = PlainLM(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    model(**batch).loss.backward()
    before = torch.get_rng_state()
    model(**batch).loss.backward()
    assert torch.equal(torch.get_rng_state(), before)

    dropping = small("gpt2", n_layer=1, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    compiled(dropping, min_tokens_ratio=RATIO)
    losses = [backward(dropping, dropping(**batch).loss).loss for _ in range(2)]
    assert metrics(dropping)["matched"] is True, metrics(dropping)
    assert all(torch.isfinite(loss) for loss in losses)


def test_control_a_wrong_selection_is_noticed() -> None:
    model, batch = PlainLM(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    got = backward(model, model(**batch).loss)
    right = picks(model)
    free = [i for i in range(SEQ - 1) if i not in right.rows[1].tolist()]
    rows, weights = right.rows.clone(), right.weights.clone()
    rows[1, 0] = free[0]
    weights[1, 0] *= 1.1
    for wrong in (right._replace(rows=rows), right._replace(weights=weights)):
        assert worst(got, hf_reference(model, batch, wrong))[0] > 1e-3
