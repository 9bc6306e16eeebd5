"""Two processes decide alike: about the ratio, the selection, its slots; and neither ever waits for the other."""

from __future__ import annotations

from itertools import pairwise

import models
import pytest
import torch
from decision_cases import LAG, PERIOD

from cggr_compile.ops.predictor import parameters_of
from cggr_compile.passes.step_interface import PredictorKey
from cggr_compile.predictors import Predictors


def by_rank(results, case, key):
    return [[step[key] for step in one["steps"]] for one in results[case]]


def schedules(results, case, key):
    return [[step["state"]["schedule"][key] for step in one["steps"]] for one in results[case]]


def test_the_measured_variance_is_that_of_all_ranks(results):
    first, second = by_rank(results, "measured", "added")
    assert first == second
    measured, *_ = [added for added in first if added is not None]
    alone = by_rank(results, "measured, each alone", "added")
    left, right = (next(added for added in one if added is not None) for one in alone)
    assert min(left, right) < measured < max(left, right)
    first, second = schedules(results, "measured", "then")
    assert first == second and any(each is not None for each in first), "the tokens' gradients too"
    ratios = by_rank(results, "measured", "ratio")
    assert ratios[0] == ratios[1] and len(set(ratios[0])) == 2, "it has moved"


@pytest.mark.slow
def test_the_confidence_is_that_of_all_ranks(slow_results):
    first, second = schedules(slow_results, "confident", "confidence")
    assert first == second and len(set(first)) == 2, "none, and one"
    alone = schedules(slow_results, "confident, each alone", "confidence")
    assert alone[0] != alone[1] and len(set(alone[0])) > 2
    sent = alone[0][PERIOD], alone[1][PERIOD]
    assert min(sent) < first[-1] < max(sent)


def test_slots_grow_at_the_same_step(results):
    first, second = by_rank(results, "growing", "growth")
    assert first == second and first[-1] == 1 and first[PERIOD] == 0
    assert by_rank(results, "growing", "slots")[0][-1] == 2 * by_rank(results, "growing", "slots")[0][0]


@pytest.mark.slow
def test_alone_they_grow_apart(slow_results):
    alone = by_rank(slow_results, "growing, each alone", "growth")
    assert alone[0][-1] == 0 and alone[1][-1] > 0


@pytest.mark.slow
def test_slots_are_those_of_the_fullest_rank(slow_results):
    assert [slots[0] for slots in by_rank(slow_results, "slots", "slots")] == [6, 6]
    assert by_rank(slow_results, "slots", "selection") == [["labels"] * 2] * 2
    assert by_rank(slow_results, "slots", "slots")[1][1] == 12, "a later batch has what it needs, where it is compiled"


def test_the_selection_is_decided_by_the_labels_of_all_ranks(results):
    assert by_rank(results, "kind", "selection") == [["importance"]] * 2


@pytest.mark.slow
def test_alone_each_decides_by_its_own(slow_results):
    assert by_rank(slow_results, "kind, each alone", "selection") == [["labels"], ["importance"]]


@pytest.mark.slow
def test_a_rank_whose_first_batch_has_no_labels(slow_results):
    assert by_rank(slow_results, "no labels at first", "selection") == [["labels"] * 2] * 2
    assert by_rank(slow_results, "no labels at first", "slots") == [[3] * 2] * 2


def test_predictors_learn_from_the_rows_of_all_ranks(results):
    """Both take up the mean of what they were after the first step, in the same step."""
    key = PredictorKey(0, 1, 2 * models.HIDDEN)
    ranks = []
    for one in results["learned"]:
        steps = []
        for step in one["steps"]:
            predictors = Predictors()
            predictors.load_state_dict(step["state"]["predictors"])
            steps.append(parameters_of(predictors.get(key, torch.device("cpu"))))
        ranks.append(steps)
    mean = (ranks[0][0] + ranks[1][0]) / 2
    for steps in ranks:
        towards = mean - steps[0]
        taken = [float((after - before) @ towards / towards.square().sum()) for before, after in pairwise(steps)]
        assert taken[3 * LAG - 1] == pytest.approx(1.0, abs=0.3), "all of the way, behind what it learned by itself"
        assert max(abs(taken[3 * LAG - 2]), abs(taken[3 * LAG])) < 0.3
    assert not torch.equal(*(steps[-1] for steps in ranks))


def test_they_decide_together(results):
    for case in ("measured", "growing", "kind"):
        assert not any(one["alone"] for one in results[case]), case


@pytest.mark.slow
def test_uneven_inputs(slow_results):
    """Under Join a rank may end at any step: each decides for itself."""
    assert all(one["alone"] for one in slow_results["joined"])
    assert [len(one["steps"]) for one in slow_results["joined"]] == [16, 3]


def test_nobody_waits_for_a_rank_that_dynamo_has_given_up_on(results):
    """Who did would not be there for the other's reduction, within a minute."""
    assert all(one["alone"] for one in results["given up"])


@pytest.mark.slow
def test_nobody_waits_for_a_rank_that_is_not_rewritten(slow_results):
    assert all(one["alone"] for one in slow_results["refused"])


def test_a_failed_verification_raises_on_all_ranks(results):
    first, second = results["verification fails"]
    assert first["error"].startswith("on rank 1: the row-sparse backward and the dense one differ in a weight")
    assert second["error"].startswith("the row-sparse backward and the dense one differ in a weight")
    assert first["compared"] == second["compared"] == 2
