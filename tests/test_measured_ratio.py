from __future__ import annotations

import pytest
import torch

from cggr_compile.measured_ratio import MeasuredRatio
from cggr_compile.options import Options
from cggr_compile.relative_variance import RelativeVariance, dense_share
from cggr_compile.variance_prediction import VariancePrediction, advice

LADDER = (1.0, 0.5, 0.25)
RANDOM, KNOWN = RelativeVariance(0.4, 1.0, 1.0), RelativeVariance(0.4, 0.5, 1.0)


def sums(achieved, concentration=0.4):
    """Those of one step, of rows that are as many per label as the ratio says."""
    return torch.tensor([1.0, 1.0, concentration**0.5, 1.0, achieved])


def test_what_is_expected_at_other_ratios():
    unknown = VariancePrediction(0.6, 0.5)
    assert unknown.at(0.5) == 0.6 and unknown.at(0.25) == pytest.approx(1.8) and unknown.least(0.25) is None
    random = VariancePrediction(0.6, 0.5, RANDOM, RANDOM)
    assert random.at(0.25) == pytest.approx(1.8), "as for random tokens"
    scored = VariancePrediction(0.6, 0.25, KNOWN, KNOWN)  # V - 1: 1 at a quarter, 0 at a half
    assert scored.at(0.25) == pytest.approx(0.6) and scored.at(0.5) == 0.0 and scored.at(0.125) == pytest.approx(1.8)
    assert scored.least(0.25) == pytest.approx(0.6 * 0.6)
    later = VariancePrediction(0.6, 0.25, RANDOM, KNOWN)  # 3 then, 1 now
    assert later.at(0.25) == pytest.approx(0.2)
    assert VariancePrediction(float("inf"), 0.5, RANDOM, RelativeVariance(0.1, 0.1, 1.0)).at(0.5) == 0.0


def test_where_nearly_all_labels_are_drawn_it_is_that_of_random_tokens():
    every = RelativeVariance(0.4, 1.0, 2.0)
    assert every.added(0.5) == 0.0
    found = VariancePrediction(0.1, 0.5, every, every)
    assert found.at(0.25) == pytest.approx(0.3) and found.least(0.25) is None


def trained(steps, measured, gradients, bound=1.0, first=0):
    """Level of each step: ``measured`` has (E / V_batch, ratio) by step, ``gradients`` the sums of every step."""
    auto, options, levels = MeasuredRatio(), Options(min_tokens_ratio="auto", variance_bound=bound), []
    for step in range(first, first + steps):
        auto.decide(options, step, LADDER)
        levels.append(auto.level)
        if step in measured:
            added, ratio = measured[step]
            auto.measured(torch.tensor([added, 1.0]), ratio, gradients(step))
        if (auto.level or 1.0) < 1.0:
            auto.observe(gradients(step))
    return levels, auto


def test_goes_down_between_measurements_as_scores_get_better():
    levels, _ = trained(60, {1: (0.6, 0.5)}, lambda step: sums(1.0 if step < 30 else 0.6))
    assert levels[:3] == [None, None, 0.5]
    # 1.8 was expected at a quarter; with these scores (V is 1.4 times less) it is 0.6 * 1.4 = 0.84
    assert levels[30] == 0.5 and levels[31:] == [0.25] * 29


def test_goes_up_between_measurements_as_gradients_become_alike():
    # V - 1 is 0.4 at a half, 1.8 at a quarter; then 1 and 3
    levels, _ = trained(80, {1: (0.2, 0.5), 5: (0.2, 0.5)}, lambda step: sums(0.7 if step < 40 else 1.0))
    assert levels[40] == 0.25 and levels[41:] == [0.5] * 39


def test_a_prediction_waits_until_the_sums_are_new_and_has_a_margin():
    levels, _ = trained(40, {1: (0.6, 0.5)}, lambda step: sums(1.0 if step < 2 else 0.6))
    assert levels[2 + 19] == 0.5 and levels[2 + 20] == 0.25, "20 steps behind the measurement"
    near = trained(60, {1: (0.6, 0.5)}, lambda step: sums(1.0 if step < 2 else 0.66))[
        0
    ]  # 0.98 of the bound at a quarter
    assert near[-1] == 0.5
    assert trained(60, {1: (0.6, 0.5), 40: (0.6, 0.5)}, lambda step: sums(1.0))[0][-1] == 0.5


def test_it_resumes_exactly():
    options, auto, resumed = Options(min_tokens_ratio="auto", variance_bound=1.0), None, MeasuredRatio()
    _, auto = trained(35, {1: (0.6, 0.5)}, lambda step: sums(1.0 if step < 34 else 0.6))
    resumed.load_state_dict(auto.state_dict())
    for each in (auto, resumed):
        each.decide(options, 35, LADDER)
    assert auto.level == resumed.level == 0.25 and resumed.state_dict() == auto.state_dict()


def test_advice():
    assert dense_share(0.25) == 0.5
    assert not advice(VariancePrediction(1.1, 0.25), 0.25, trains=True, learned=False), "2.1 for 2"
    said = advice(VariancePrediction(1.5, 0.25), 0.25, trains=True, learned=False)
    assert "2.50 times" in said and "50% of each batch" in said and "2.00 times. So a smaller batch" in said
    known = VariancePrediction(1.5, 0.25, RANDOM, RANDOM)  # V - 1: 3, of the best 0.6
    said = advice(known, 0.25, trains=True, learned=False)
    assert "scores would have 1.30 (concentration 0.40): selection='importance' with scoring='learned'" in said
    assert "would have 1.30 (concentration 0.40): a smaller batch" in advice(known, 0.25, trains=True, learned=True)
    alike = RelativeVariance(0.9, 1.0, 1.0)
    said = advice(VariancePrediction(1.5, 0.25, alike, alike), 0.25, trains=False, learned=False)
    assert "the next one" in said and "would have 2.30 (concentration 0.90): a smaller batch" in said


def test_it_is_said_of_two_measurements_in_a_row():
    worse, better = (2.0, 0.5), (0.1, 0.5)
    for measured, found in (
        ({1: worse}, False),
        ({1: worse, 3: better, 5: worse}, False),
        ({1: worse, 3: worse}, True),
    ):
        levels, auto = trained(8, measured, lambda step: sums(1.0), bound=1e9)
        assert bool(auto.advice()) == found and levels[-1] < 1.0
