from __future__ import annotations

import copy
import math
import weakref

import models
import pytest
import torch
from reference import backward, dense
from training import metrics

import cggr_compile
from cggr_compile.variance import FIGURES, Gradients, VarianceMeter, added, move
from cggr_compile.variance_prediction import VariancePrediction

LADDER = (1.0, 0.75, 0.5, 0.25)
ROWS, SIZE = 8, 100_000


def toy(noise, bias=0.0):
    """The gradient of a toy model, dense and under a selection that adds noise and a bias: shares of the batches'."""

    def dense(args):
        return Gradients([args[0].mean(0), torch.zeros(3)])

    def selected(args):
        total = torch.randn(SIZE) * (noise / ROWS) ** 0.5 + (bias / ROWS) ** 0.5
        return Gradients([args[0].mean(0) + total, torch.zeros(3)])

    return dense, selected


@pytest.mark.parametrize(("noise", "bias"), [(1 / 3, 0.0), (0.0, 1 / 3), (0.2, 1.0), (0.0, 0.0)])
def test_estimates_what_is_added(noise, bias):
    meter = VarianceMeter(every=2)
    batches = [[torch.randn(ROWS, SIZE)] for _ in range(4)]
    measured = [meter.measure(step, batch, lambda: toy(noise, bias)) for step, batch in enumerate(batches)]
    assert measured[0] is None and measured[2] is None
    for found in (measured[1], measured[3]):
        assert found.moments is None and added(*found.figures.tolist()) == pytest.approx(noise + bias, rel=0.1)


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [
        (3, range(9), [1, 4, 7]),
        (1, range(3), [1, 2]),
        (3, [0, 0, 0, 1, 1, 2, 2], [1]),  # micro-batches
        (3, [0, 2, 4, 7], []),  # other graphs ran in between
        (3, [7, 8, 9, 10], [10]),  # resumed
    ],
)
def test_when_it_measures(every, steps, expected):
    meter, found = VarianceMeter(every), []
    for step in steps:
        if meter.measure(step, [torch.zeros(1, SIZE)], lambda: toy(0.0)) is not None:
            found.append(step)
    assert found == expected


def test_the_batch_before_is_a_copy():
    meter, seen = VarianceMeter(every=2), []
    parameter, buffer = torch.nn.Parameter(torch.zeros(1)), torch.zeros(1)

    def gradient(args):
        seen.append([float(arg) for arg in args])
        return Gradients([torch.ones(20)])

    for step in range(2):
        meter.measure(step, [parameter, buffer], lambda: (gradient, gradient))
        buffer.add_(1)
        parameter.data.add_(1)
    assert seen == [[1, 1], [1, 0], [1, 1]], "the parameters of now, the batch of then"
    meter.measure(2, [parameter, buffer], lambda: (gradient, gradient))
    alive = weakref.ref(parameter)
    del parameter
    assert alive() is None


@pytest.mark.parametrize(
    ("within", "between", "ratio"),
    [(1.0, 2.0, 0.5), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 0.0, math.inf), (2.0, 1.0, 2.0)],
)
def test_added(within, between, ratio):
    assert added(within, between) == ratio


@pytest.mark.parametrize("figures", [(math.nan, 1.0), (1.0, math.inf)])
def test_overflow_says_nothing(figures):
    assert added(*figures) is None


@pytest.mark.parametrize(
    ("rung", "measured", "at", "expected"),
    [
        (1.0, 0.4, 0.75, 0.75),
        (1.0, 0.6, 0.75, 1.0),
        (1.0, math.inf, 0.75, 1.0),
        (0.75, 0.1, 0.75, 0.5),  # 0.3 is predicted there
        (0.75, 0.2, 0.75, 0.75),  # 0.6
        (0.75, 0.6, 0.75, 1.0),
        (0.5, 0.6, 0.5, 0.75),
        (0.5, 0.6, 0.75, 0.75),  # measured before the last move: 1.8 is predicted here
        (0.25, 0.0, 0.25, 0.25),
        (0.25, math.inf, 0.25, 0.5),
    ],
)
def test_move(rung, measured, at, expected):
    assert move(rung, LADDER, VariancePrediction(measured, at).at, bound=0.5) == expected


def batches(count):
    return [models.make_batch(4, seed=seed, ignored=False) for seed in range(count)]


def gradient_of(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return torch.cat([p.grad.reshape(-1)[::17] for p in model.parameters()]).double()


@pytest.mark.parametrize("gradient", ["exact", "routed"])
def test_measures_what_brute_force_finds(gradient):
    """The error at ratio 0.5 and V_batch of a model against the means of many gradients."""
    options = {"gradient": gradient, "scoring": "random"}
    plain = models.PlainLM()
    exact = torch.stack([gradient_of(plain, batch) for batch in batches(16)])
    model = models.compiled(models.PlainLM(), min_tokens_ratio=0.5, **options)
    draws = torch.stack([torch.stack([gradient_of(model, batch) for _ in range(4)]) for batch in batches(16)])
    error = (draws - exact[:, None]).square().sum(-1).mean()
    batch = exact.var(dim=0).sum()
    variance = draws.var(dim=1).sum(-1).mean()
    assert error > 1.02 * variance if gradient == "routed" else error == pytest.approx(float(variance), rel=0.1)

    torch._dynamo.reset()
    auto = {"min_tokens_ratio": "auto", "ladder": (0.5,), "measure_every": 1, "variance_bound": 1e-9, **options}
    model = models.compiled(models.PlainLM(), **auto)
    rt, figures = cggr_compile.runtime(model), []
    for data in batches(24):
        model(**data)
        figures.append(rt.state_dict()["schedule"]["variance"])
    within, between = torch.tensor(figures[1:])[:, :FIGURES].mean(0).tolist()
    assert within == pytest.approx(float(error), rel=0.15)
    assert between == pytest.approx(float(batch), rel=0.15)
    assert metrics(model)["ratio"] == 1.0 and metrics(model)["added_variance"] > 0


def test_measuring_leaves_training_alone():
    """Nothing may be dropped, so training is dense: loss, gradients, buffers and random numbers."""
    model = models.PlainLM()
    plain = copy.deepcopy(model)
    options = {"min_tokens_ratio": "auto", "ladder": (0.5,), "measure_every": 2, "variance_bound": 1e-9}
    models.compiled(model, **options)
    hooked = []
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: hooked.append(1))
    for step, batch in enumerate(batches(5)):
        before = torch.get_rng_state()
        got = backward(model, model(**batch).loss)
        assert torch.equal(torch.get_rng_state(), before)
        want = dense(plain, batch)
        assert torch.equal(got.loss, want.loss)
        assert all(torch.equal(got.grads[name], grad) for name, grad in want.grads.items())
        assert metrics(model)["step"] == step + 1 and metrics(model)["ratio"] == 1.0
    assert len(hooked) == 5 and metrics(model)["added_variance"] is not None


def test_goes_down_the_ladder_and_back():
    model = models.compiled(
        models.PlainLM(), min_tokens_ratio="auto", ladder=(0.5, 0.25), measure_every=1, variance_bound=100.0
    )
    rt, data = cggr_compile.runtime(model), batches(8)
    ratios = []
    for batch in data[:4]:
        model(**batch).loss.backward()
        ratios.append(metrics(model)["ratio"])
    assert ratios == [1.0, 1.0, 0.5, 0.25]
    for batch in [data[4]] * 4:  # batches that do not differ: all noise is the selection's
        model(**batch).loss.backward()
        ratios.append(metrics(model)["ratio"])
    # the second of them is the first to be compared with itself
    assert ratios[4:] == [0.25, 0.25, 0.5, 1.0]
    assert rt.metrics()["added_variance"] > 100.0
