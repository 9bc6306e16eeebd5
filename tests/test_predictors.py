"""What a runtime keeps of its predictors: as text, and together with those of other processes."""

from __future__ import annotations

import json

import pytest
import torch
from test_agreement import processes

from cggr_compile import predictor_exchange
from cggr_compile.ops.predictor import SUMS, new_predictor, parameters_of
from cggr_compile.passes.step_interface import PredictorKey
from cggr_compile.predictors import Predictors
from cggr_compile.shared_readback import LAG, SharedReadback

KEY, OTHER = PredictorKey(0, 1, 5), PredictorKey(1, 1, 4)
CPU = torch.device("cpu")


def test_text_and_back():
    ours, theirs = Predictors(), Predictors()
    first = ours.get(KEY, CPU)
    assert torch.equal(first, new_predictor(KEY.features)) and torch.equal(theirs.get(KEY, CPU), first)
    ours.update({KEY: torch.rand(len(first)) / 3, OTHER: new_predictor(OTHER.features) * 1e-30})
    theirs.load_state_dict(json.loads(json.dumps(ours.state_dict())))
    for key in (KEY, OTHER):
        assert torch.equal(theirs.get(key, CPU), ours.get(key, CPU))
    theirs.load_state_dict({})
    assert torch.equal(theirs.get(KEY, CPU), first)


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ([], "predictors must be a dict"),
        ({"0/1": ""}, "'forward/layer/features'"),
        ({3: ""}, "'forward/layer/features'"),
        ({str(KEY): "AAA*"}, "base64"),
        ({str(KEY): "AAA="}, "base64"),
        ({str(KEY): 4}, "base64"),
        ({str(KEY): "AAAAAA=="}, "numbers, there are 1"),
    ],
)
def test_bad_states(state, match):
    with pytest.raises(ValueError, match=match):
        Predictors().load_state_dict(state)


class Process:
    """One process's steps: each adds its own number to every parameter."""

    def __init__(self, agreement, learns, keys=(KEY, OTHER)):
        self.step, self.learns, self.keys, self.predictors = 0, learns, keys, Predictors()
        self.shared = self.predictors.share(
            lambda topic, combine, **when: SharedReadback(agreement, topic, combine, lambda: self.step, **when)
        )

    def run(self):
        self.step += 1
        self.shared.advance()
        states = {key: self.predictors.get(key, CPU) for key in self.keys}
        kept = {key: state.clone() for key, state in states.items()}
        self.predictors.update({key: state + self.learns for key, state in states.items()})
        assert all(torch.equal(states[key], kept[key]) for key in self.keys)  # never written to


def mean_parameter(process, key=KEY):
    parameters = parameters_of(process.predictors.get(key, CPU)) - parameters_of(new_predictor(key.features))
    assert parameters.max() - parameters.min() < 0.1  # they travel as float16
    return float(parameters.mean())


def test_processes_learn_together():
    group = [Process(one, learns) for one, learns in zip(processes(), (0.25, 0.75), strict=True)]
    for _ in range(3 * LAG + 1):
        for one in group:
            one.run()
    for key in (KEY, OTHER):
        # after the first step, and by itself since
        assert [mean_parameter(one, key) for one in group] == pytest.approx(
            [0.5 + 0.25 * 3 * LAG, 0.5 + 0.75 * 3 * LAG], abs=2e-3
        )
    sums = [one.predictors.get(KEY, CPU)[:SUMS] for one in group]
    assert not torch.equal(*sums)
    for _ in range(predictor_exchange.PERIOD):
        for one in group:
            one.run()
    ahead = 0.5 * 3 * LAG
    assert mean_parameter(group[1]) - mean_parameter(group[0]) == pytest.approx(ahead, abs=0.1)


def test_processes_that_predict_for_other_graphs_learn_alone():
    group = [Process(one, 0.25, keys) for one, keys in zip(processes(), ((KEY,), (KEY, OTHER)), strict=True)]
    for _ in range(3 * LAG + 1):
        for one in group:
            one.run()
    assert [mean_parameter(one) for one in group] == pytest.approx([0.25 * (3 * LAG + 1)] * 2, abs=2e-3)


def test_alone_nothing_is_sent():
    (agreement,) = processes(1)
    one = Process(agreement, 0.25)
    one.shared.send = None  # who called it would fail
    for _ in range(40):
        one.run()
    assert mean_parameter(one) == pytest.approx(10.0, abs=2e-3)
