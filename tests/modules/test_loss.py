from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs

from cggr_compile import CGGRLoss
from cggr_compile.ops.difficulty import difficulty
from cggr_compile.ops.score_logits import score_logits

VOCAB = 11
SCORINGS = ("entropy", "margin", "loss", "combined")
SELECTIONS = ("topk", "stratified", "sequence_aware", "fixed_quota")

pytestmark = pytest.mark.filterwarnings("ignore:selection=")


def make(ratio=0.5, **arguments):
    return CGGRLoss(min_tokens_ratio=ratio, **{"warmup_steps": 0, "dynamic_threshold": False, **arguments})


def batch(size=2, seq=8, *, ignored=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(size, seq, VOCAB, generator=generator) * 2).requires_grad_()
    targets = torch.randint(0, VOCAB, (size, seq), generator=generator)
    if ignored:
        targets[0, ::3] = -100
    return logits, targets


def hardest(logits, targets, scoring, count):
    """The loss over the ``count[i]`` hardest candidates of sequence i, written without the code under test."""
    log_p = logits.detach().double().log_softmax(-1)
    p = log_p.exp().sort(-1, descending=True).values
    terms = {
        "entropy": -(log_p.exp() * log_p).sum(-1) - p[..., 0],
        "margin": 1 - (p[..., 0] - p[..., 1]),
        "loss": -log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0],
    }
    terms["combined"] = sum(terms.values())
    scores = torch.where(targets == -100, -torch.inf, terms[scoring])
    chosen = torch.cat([i * scores.shape[1] + scores[i].topk(k).indices for i, k in enumerate(count)])
    return F.cross_entropy(logits.flatten(0, 1)[chosen], targets.flatten()[chosen])


@pytest.mark.parametrize("scoring", SCORINGS)
def test_mean_over_the_hardest_and_its_gradient(scoring):
    logits, targets = batch()
    got = make(scoring=scoring)(logits, targets)
    want = hardest(logits, targets, scoring, (3, 4))  # of 5 and 8 candidates
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (got, want)))
    other = hardest(logits, targets, SCORINGS[SCORINGS.index(scoring) - 1], (3, 4))
    assert not torch.allclose(got, other)  # the control: another scoring selects other tokens


@pytest.mark.parametrize("selection", SELECTIONS)
def test_ratio_one_is_the_plain_loss(selection):
    logits, targets = batch()
    got = make(1.0, selection=selection)(logits, targets)
    torch.testing.assert_close(got, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def test_one_sequence_without_a_batch_axis():
    logits, targets = batch(1)
    loss = make()
    torch.testing.assert_close(loss(logits[0], targets[0]), loss(logits, targets))


def test_shifted_slices_as_a_language_model_passes_them():
    logits, targets = batch()
    loss = make()
    sliced = loss(logits[:, :-1], targets[:, 1:])
    torch.testing.assert_close(sliced, loss(logits[:, :-1].contiguous(), targets[:, 1:].contiguous()))


def test_nothing_to_learn_is_zero():
    logits, targets = batch()
    loss = make()
    value = loss(logits, torch.full_like(targets, -100))
    value.backward()
    assert value == 0 and not logits.grad.any()
    assert loss.get_metrics()["tokens_selected"] == 0 == loss.get_metrics()["tokens_total"]


def test_base_loss():
    logits, targets = batch()
    smooth = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.2)
    got = make(1.0, base_loss=smooth)(logits, targets)
    torch.testing.assert_close(got, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.2))

    def squared(rows, wanted):  # no ignore_index of its own: must never see -100
        assert wanted.min() >= 0
        return (rows.softmax(-1) - F.one_hot(wanted, VOCAB)).square().sum(-1)

    valid = targets != -100
    torch.testing.assert_close(
        make(1.0, base_loss=squared)(logits, targets), squared(logits[valid], targets[valid]).mean()
    )


def test_ignore_index_of_the_base_loss():
    logits, targets = batch()
    other = make(base_loss=nn.CrossEntropyLoss(reduction="none", ignore_index=3))
    marked = torch.where(targets == -100, 3, torch.where(targets == 3, 4, targets))
    want = make()(logits, torch.where(marked == 3, -100, marked))
    torch.testing.assert_close(other(logits, marked), want)


def test_unusable_base_losses():
    with pytest.raises(ValueError, match="base_loss must be None or callable"):
        make(base_loss=3)
    with pytest.raises(ValueError, match="base_loss must have reduction='none', got 'mean'"):
        make(base_loss=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="base_loss must return a loss per token"):
        make(base_loss=lambda logits, targets: F.cross_entropy(logits, targets))(*batch())


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        ((2, 8, 5), (2, 7), "does not match targets shape"),
        ((2, 8, 5), (16,), "does not match targets shape"),
        ((2, 3, 4, 5), (2, 3, 4), "Unsupported logits shape"),
    ],
)
def test_shapes(logits, targets, message):
    with pytest.raises(ValueError, match=message):
        make()(torch.randn(logits), torch.zeros(targets, dtype=torch.long))


def test_metrics_follow_the_schedule():
    loss = CGGRLoss(min_tokens_ratio=0.25, warmup_steps=4, dynamic_threshold=False, scoring="entropy")
    assert loss.get_metrics() == {}
    logits, targets = batch(ignored=False)
    seen = []
    for _ in range(6):
        loss(logits, targets)
        seen.append(loss.get_metrics())
        loss.step()
    assert [m["token_ratio"] for m in seen] == [1.0, 0.8125, 0.625, 0.4375, 0.25, 0.25]
    assert [m["tokens_selected"] for m in seen] == [16, 14, 10, 8, 4, 4]  # of two sequences
    assert [m["step"] for m in seen] == list(range(6))
    last = seen[-1]
    assert list(last) == [
        *("step", "token_ratio", "tokens_selected", "tokens_total"),
        *("avg_confidence", "avg_entropy", "avg_difficulty", "selection", "scoring"),
    ]
    assert (last["tokens_total"], last["selection"], last["scoring"]) == (16, "topk", "entropy")
    assert last["avg_difficulty"] == pytest.approx(last["avg_entropy"] - last["avg_confidence"], abs=1e-5)


def test_averages_are_over_the_candidates():
    logits, targets = batch(ignored=False)
    logits = logits.detach()
    logits[0] = 0.0
    logits[0, :, 0] = 50.0  # a sequence of certainty
    loss = make()
    assert (loss(logits, targets), loss.get_metrics()["avg_confidence"])[1] > 0.7
    targets[0] = -100
    assert (loss(logits, targets), loss.get_metrics()["avg_confidence"])[1] < 0.7


def test_dynamic_threshold_goes_both_ways():
    _, targets = batch(ignored=False)
    ratios = []
    for scale in (0.0, 50.0):
        logits = F.one_hot(targets, VOCAB).float() * scale
        loss = CGGRLoss(min_tokens_ratio=0.5, warmup_steps=0)
        loss(logits, targets)
        ratios.append(loss.get_metrics()["token_ratio"])
    assert ratios[0] > 0.5 > ratios[1]
    quota = CGGRLoss(min_tokens_ratio=0.5, warmup_steps=0, selection="fixed_quota")
    quota(logits, targets)
    assert quota.get_metrics()["token_ratio"] == 0.5


def test_resumes_the_schedule():
    loss, resumed = make(), make()
    for _ in range(3):
        loss.step()
    assert set(loss.state_dict()) == {"step_count"}
    resumed.load_state_dict(loss.state_dict())
    assert resumed.step_count == 3


def test_biased_selections_warn():
    for selection in SELECTIONS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            CGGRLoss(selection=selection)
        assert len(caught) == (0 if selection == "stratified" else 1), selection


@pytest.mark.parametrize(("scoring", "selection"), list(itertools.product(SCORINGS, SELECTIONS)))
def test_one_graph_for_the_whole_schedule(scoring, selection):
    arguments = {"scoring": scoring, "selection": selection, "min_tokens_ratio": 0.25, "warmup_steps": 3}
    loss, twin = CGGRLoss(**arguments), CGGRLoss(**arguments)
    captured = EagerAndRecordGraphs()
    compiled = torch.compile(loss, fullgraph=True, backend=captured)
    for seed in range(4):
        logits, targets = batch(seed=seed)
        torch.testing.assert_close(compiled(logits, targets), twin(logits, targets))
        assert loss.get_metrics() == twin.get_metrics()
        loss.step()
        twin.step()
    assert len(captured.graphs) == 1


@pytest.mark.parametrize("selection", SELECTIONS)
def test_sizes_that_change(selection):
    loss = make(selection=selection)
    compiled = torch.compile(loss, fullgraph=True, backend="eager", dynamic=True)
    for size, seq in ((2, 8), (3, 5), (1, 12)):
        logits, targets = batch(size, seq)
        torch.testing.assert_close(compiled(logits, targets), loss(logits, targets))


@pytest.mark.slow
def test_inductor():
    loss, twin = make(selection="stratified"), make(selection="stratified")
    logits, targets = batch()
    got, want = torch.compile(loss, fullgraph=True, backend="inductor")(logits, targets), twin(logits, targets)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (got, want)))
    assert loss.get_metrics() == pytest.approx(twin.get_metrics())


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_step_reads_nothing_back(selection, monkeypatch):
    """No tensor becomes a Python number: on an accelerator each one would wait for the device."""
    loss = CGGRLoss(selection=selection, warmup_steps=2)
    logits, targets = batch()
    with monkeypatch.context() as patched:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"):
            patched.setattr(torch.Tensor, name, lambda *a, name=name, **k: pytest.fail(f"Tensor.{name} in a step"))
        loss(logits, targets).backward()
        loss.step()
        with pytest.raises(pytest.fail.Exception):  # the trap works
            loss.get_metrics()


def test_low_precision():
    logits, targets = batch()
    half = logits.detach().bfloat16().requires_grad_()
    value = make()(half, targets)
    value.backward()
    assert value.isfinite() and half.grad.isfinite().all()
    _, entropy, top1, top2, label = score_logits(half.detach(), targets)
    assert difficulty(entropy, top1, top2, label, "combined").dtype == torch.float32
