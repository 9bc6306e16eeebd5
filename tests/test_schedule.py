from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cggr_compile import Options
from cggr_compile.schedule import Schedule, round_up, rungs, target

FIVE = (1.0, 0.75, 0.5, 0.375, 0.25)


@pytest.mark.parametrize(
    ("options", "ladder"),
    [
        ({}, (0.25,)),
        ({"min_tokens_ratio": 1.0, "warmup_steps": 10}, (1.0,)),
        ({"ladder": [0.5]}, (0.25,)),  # nothing moves
        ({"warmup_steps": 10}, FIVE),
        ({"warmup_steps": 10, "min_tokens_ratio": 0.4}, (1.0, 0.75, 0.5, 0.4)),
        ({"warmup_steps": 10, "ladder": (0.5,)}, (1.0, 0.5, 0.25)),
        ({"warmup_steps": 10, "ladder": [0.1, 1, 0.5]}, (1.0, 0.5, 0.25)),  # 0.1 cannot be reached
        ({"dynamic_threshold": True}, (0.375, 0.25, 0.1875, 0.125)),
        ({"dynamic_threshold": True, "threshold_sensitivity": 0.0}, (0.25,)),
        ({"dynamic_threshold": True, "threshold_sensitivity": 1.0}, (0.5, 0.375, 0.25, 0.1875, 0.125)),
        ({"dynamic_threshold": True, "min_tokens_ratio": 0.8}, (1.0, 0.8, 0.6, 0.4)),
        ({"dynamic_threshold": True, "ladder": [0.3, 0.2]}, (0.3, 0.25, 0.2)),
        ({"dynamic_threshold": True, "warmup_steps": 4}, (*FIVE, 0.1875, 0.125)),
        ({"min_tokens_ratio": "auto"}, (1.0, 0.5, 0.375, 0.25)),
        ({"min_tokens_ratio": "auto", "ladder": (0.1, 0.4)}, (1.0, 0.4, 0.1)),
    ],
    ids=str,
)
def test_rungs(options, ladder):
    assert rungs(Options(**options)) == pytest.approx(ladder)


def test_curriculum_is_linear_and_rounds_up():
    options = Options(warmup_steps=12)
    wanted = [target(options, step, None) for step in range(15)]
    assert wanted == pytest.approx([1 - 0.75 * min(step, 12) / 12 for step in range(15)])
    steps = [round_up(ratio, rungs(options)) for ratio in wanted]
    # 1, .9375, .875, .8125, .75, .6875, .625, .5625, .5, .4375, .375, .3125, .25
    assert steps == [1, 1, 1, 1, 0.75, 0.75, 0.75, 0.75, 0.5, 0.5, 0.375, 0.375, 0.25, 0.25, 0.25]


def test_dynamic_threshold_goes_both_ways():
    options = Options(dynamic_threshold=True, threshold_sensitivity=0.5)
    ratios = {c: target(options, 0, c) for c in (0.0, 0.25, 0.5, 0.75, 1.0)}
    assert ratios == pytest.approx({0.0: 0.375, 0.25: 0.3125, 0.5: 0.25, 0.75: 0.1875, 1.0: 0.125})
    assert [round_up(r, rungs(options)) for r in ratios.values()] == [0.375, 0.375, 0.25, 0.1875, 0.125]
    assert target(options, 0, None) == 0.25
    assert target(Options(), 0, 1.0) == 0.25
    during_warmup = Options(dynamic_threshold=True, warmup_steps=10)
    assert target(during_warmup, 5, 0.9) == pytest.approx(0.625 * 0.6)
    assert target(during_warmup, 0, 0.0) == 1.0


@given(
    base=st.integers(1, 100).map(lambda n: n / 100),
    warmup=st.integers(0, 50),
    dynamic=st.booleans(),
    sensitivity=st.floats(0.0, 1.0),
    ladder=st.none() | st.lists(st.integers(1, 100).map(lambda n: n / 100), min_size=1, max_size=5),
    step=st.integers(0, 60),
    confidence=st.none() | st.floats(0.0, 1.0),
)
def test_every_target_has_its_rung(base, warmup, dynamic, sensitivity, ladder, step, confidence):
    options = Options(
        min_tokens_ratio=base,
        warmup_steps=warmup,
        dynamic_threshold=dynamic,
        threshold_sensitivity=sensitivity,
        ladder=ladder,
    )
    available = rungs(options)
    assert list(available) == sorted(set(available), reverse=True) and base in available
    assert warmup == 0 or available[0] == 1.0
    wanted = target(options, step, confidence)
    chosen = round_up(wanted, available)
    if wanted <= available[0]:
        assert chosen >= wanted - 1e-8
        assert not any(wanted <= rung < chosen for rung in available)
    else:
        assert chosen == available[0]


def figures(confidence, total=10.0):
    return torch.tensor([3.0, total, confidence, 1.0, 1.0])


def test_figures_arrive_at_the_next_step():
    schedule, options = Schedule(), Options(dynamic_threshold=True)
    assert schedule.ratio(options, 0) == 0.25
    schedule.observe(figures(1.0))
    assert schedule.ratio(options, 0) == 0.25, "a step keeps its ratio"
    assert schedule.ratio(options, 1) == 0.125
    assert schedule.ratio(options, 2) == 0.125, "the last figures stand"
    schedule.observe(figures(0.0, total=0.0))  # a batch without candidates
    assert schedule.ratio(options, 3) == 0.125
    schedule.observe(figures(0.5))
    assert schedule.ratio(options, 4) == 0.25
    schedule.observe(figures(float("nan")))  # without a router
    assert schedule.ratio(options, 5) == 0.25


@pytest.mark.parametrize("advanced", [False, True], ids=["within a step", "between steps"])
def test_resumes_with_figures_under_way(advanced):
    options, schedule, resumed = Options(dynamic_threshold=True), Schedule(), Schedule()
    for confidence in (1.0, 0.0):
        schedule.ratio(options, 6)
        schedule.observe(figures(confidence))
    step = 7 if advanced else 6
    resumed.load_state_dict(schedule.state_dict(step), step)
    ratios = [[s.ratio(options, n) for n in (step, step + 1)] for s in (schedule, resumed)]
    assert ratios[0] == ratios[1] == ([0.125, 0.125] if advanced else [0.25, 0.125])
    schedule.reset()
    assert schedule.ratio(options, 0) == 0.25


def test_auto_starts_dense_and_follows_the_measurements():
    options = Options(min_tokens_ratio="auto", warmup_steps=2, variance_bound=1.0)
    schedule, resumed = Schedule(), Schedule()
    ratios = []
    for step, within in enumerate([None, None, 3.0, None, 3.0, 20.0, 20.0]):
        ratios.append(schedule.ratio(options, step))
        if within is not None:
            schedule.auto.measured(torch.tensor([within, 10.0]), min(ratios[-1], 0.5), None)
    # 3 / 10 at 0.5 predicts 3 / 10 * 5 / 3 at 0.375; 20 / 10 is too much anywhere
    assert ratios == [1.0, 1.0, 1.0, 0.5, 0.5, 0.375, 0.5] and schedule.auto.added == pytest.approx(2.0)
    resumed.load_state_dict(schedule.state_dict(7), 7)
    assert resumed.ratio(options, 7) == schedule.ratio(options, 7) == 1.0 and resumed.auto.added == schedule.auto.added


@pytest.mark.parametrize(
    "change", [{"target": "high"}, {"level": True}, {"figures": 0.5}, {"variance": ["1"]}, {"rung": 1.0}], ids=str
)
def test_bad_states_name_the_field(change):
    schedule = Schedule()
    with pytest.raises(ValueError, match=f"schedule.*{next(iter(change))}"):
        schedule.load_state_dict({**schedule.state_dict(0), **change}, 0)
