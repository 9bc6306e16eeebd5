"""``advise``: what it measures, what it concludes, what it leaves alone."""

from __future__ import annotations

import json
import math
import re

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cggr_compile
from cggr_compile.__main__ import main
from cggr_compile.advise import Candidate, decide
from cggr_compile.gradient_concentration import added_variance, concentration, token_gradients
from cggr_compile.trial import loss_of

EAGER = {"compiler": "eager", "launch_bound": "select"}


def answers(size=2, seq=24):
    batch = models.make_batch(size, seq)
    batch["labels"][:, : seq - 6] = -100
    return batch


def test_gradients_of_tokens_are_autograds():
    model, batch = models.PlainLM(), answers()
    found = token_gradients(model, batch)
    logits = model(batch["input_ids"]).logits.detach().requires_grad_()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, grad.norm(dim=-1))
    assert model.training and (found > 0).sum() == 12


def test_concentration_and_variance():
    g = torch.tensor([[3.0, 1.0, 0.0, 0.0]])  # two of these have no label
    labelled = torch.tensor([[True, True, False, False]])
    assert concentration(g, labelled) == pytest.approx(4.0 / 5.0)
    assert concentration(g, torch.tensor([[True, True, True, False]])) == pytest.approx(16.0 / 30.0), "one is known"
    assert concentration(torch.zeros(1, 2), labelled[:, :2]) == concentration(g, labelled & False) == 1.0
    # one of two at random, then in proportion to g: expectations over both outcomes
    random = [added_variance(g, torch.tensor([w])) for w in ([2.0, 0, 0, 0], [0, 2.0, 0, 0])]
    assert sum(random) / 2 == pytest.approx(2.0)
    ours = [(0.75, [4 / 3, 0, 0, 0]), (0.25, [0, 4.0, 0, 0])]
    mean = sum(p * added_variance(g, torch.tensor([w])) for p, w in ours)
    assert mean == pytest.approx(2.0 * concentration(g, labelled))


def candidate(name, step, variance, level="routed"):
    return Candidate(name, {"selection": name}, level, "no loss", step, 0.5, variance)


@pytest.mark.parametrize(
    ("found", "half", "options", "says"),
    [
        ([candidate("labels", 0.5, 1.0)], 0.55, {"selection": "labels"}, "a dense step 1.00"),
        ([candidate("a", 0.4, 3.0), candidate("b", 0.6, 1.5)], 0.55, {"selection": "b"}, "0.90 of the dense time"),
        ([candidate("a", 0.4, 3.0), candidate("b", 0.6, 1.5)], 0.45, None, "stay dense: .*, b, takes 0.90"),
        ([candidate("a", 0.98, 1.0)], None, None, "stay dense"),
        ([candidate("a", 0.2, 1.0, "dense")], None, None, "stay dense: no loss"),
    ],
)
def test_decisions(found, half, options, says):
    control = None if half is None else Candidate("half", None, "dense", "", half, 0.5, 2.0)
    chosen, reason = decide(found, control)
    assert chosen == options
    assert re.search(says, reason), reason


@pytest.fixture(scope="module")
def asked():
    model, batch = models.PlainLM(), answers()
    model(**batch).loss.backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    state = torch.get_rng_state()
    advice = cggr_compile.advise(model.eval(), [batch, answers()], options=EAGER, steps=2)
    assert torch.equal(state, torch.get_rng_state()) and not model.training and model._compiled_call_impl is None
    for p, (value, grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value) and torch.equal(p.grad, grad)
    return advice


def test_few_labels(asked):
    assert asked.label_share == pytest.approx(6 / 23)
    assert [one.options["selection"] for one in asked.candidates] == ["labels", "labels"]
    assert all(one.level == "routed" and one.variance == pytest.approx(1.0) for one in asked.candidates)
    routed, exact = asked.candidates
    assert 0 < routed.memory < 1 and exact.memory > 0 and asked.dense_bytes > 0
    assert asked.half.variance == 2.0 and asked.half.memory == pytest.approx(0.5, abs=0.1)
    lines = str(asked).splitlines()
    assert len(lines) == 5 and lines[0].startswith("26.1% of the positions") and lines[-1].startswith("advice: ")
    assert json.loads(json.dumps(asked.as_dict()))["candidates"][0]["level"] == "routed"


def test_all_labels_and_one_sequence():
    batch = models.make_batch(1, 32, ignored=False)
    advice = cggr_compile.advise(models.PlainLM(), batch, options=EAGER, steps=1)
    quarter, half = advice.candidates
    assert advice.half is None and quarter.options["min_tokens_ratio"] == 0.25
    # one draw of a router that knows nothing, on gradients that are nearly equal
    assert 2.5 < quarter.variance < 6.0 and 1.4 < half.variance < 3.0
    assert math.isclose(advice.concentration, 1.0, abs_tol=0.05)


def test_what_is_not_rewritten_stays_dense():
    class Mean(models.PlainLM):
        def forward(self, input_ids, labels=None):
            logits = super().forward(input_ids).logits
            return models.Output(None if labels is None else logits.mean(), logits)

    advice = cggr_compile.advise(Mean(), answers(), options=EAGER, steps=1)
    assert advice.options is None and advice.reason.startswith("stay dense: unsupported loss")
    assert all(one.level == "dense" for one in advice.candidates)


def test_bad_arguments():
    model, batch = models.PlainLM(), models.make_batch()
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    for wrong, message in (
        (lambda: cggr_compile.advise(model, {"input_ids": batch["input_ids"]}), "batch must have labels"),
        (lambda: cggr_compile.advise(model, nothing), "labels other than -100"),
        (lambda: cggr_compile.advise(model, []), "got none"),
        (lambda: cggr_compile.advise(model, batch, steps=0), "steps must be >= 1"),
        (lambda: cggr_compile.advise(model, batch, options={"ratio": 1}), "unknown option"),
        (lambda: cggr_compile.advise(torch.nn.Embedding(8, 4), {"labels": batch["labels"]}), "."),
        (lambda: loss_of(torch.ones(2)), "must return a loss"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            wrong()
    with pytest.raises(ValueError, match="must not be compiled"):
        cggr_compile.advise(models.compiled(models.PlainLM()), batch)


def test_command_line(tmp_path, capsys):
    models.family("llama", num_hidden_layers=1).config.save_pretrained(tmp_path)
    np.save(tmp_path / "tokens.npy", np.arange(64).reshape(4, 16))
    given = ["--model", str(tmp_path), "--data", str(tmp_path / "tokens.npy"), "--seq", "16", "--options"]
    command = ["advise", *given, json.dumps(EAGER), "--batch", "2", "--count", "1", "--steps", "1", "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["label_share"] == 1.0 and "weights are random" in printed.err
    assert main(["advise", "--model", str(tmp_path)]) == 2
    assert "--model and --data" in capsys.readouterr().err
