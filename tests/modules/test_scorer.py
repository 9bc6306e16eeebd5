from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from modules import zoo
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs

from cggr_compile import CGGRScorer, TruncatedRouter

SELECTIONS = ("topk", "stratified", "sequence_aware", "fixed_quota")


class Fixed(nn.Module):
    """A router with given logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, **kwargs):
        return self.logits[: input_ids.shape[0], : input_ids.shape[1]]


def make(router=None, ratio=0.5, **arguments):
    router = Fixed(torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))) if router is None else router
    return CGGRScorer(router, min_tokens_ratio=ratio, **{"warmup_steps": 0, "dynamic_threshold": False, **arguments})


def tokens(size=3, seq=8):
    return torch.randint(0, 16, (size, seq), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_what_it_returns(selection):
    scorer = make(selection=selection)
    difficulty, mask, info = scorer(tokens())
    assert difficulty.shape == mask.shape == (3, 8)
    assert (difficulty.dtype, mask.dtype) == (torch.float32, torch.bool)
    assert not difficulty.requires_grad
    assert list(info) == ["confidence", "entropy", "current_ratio", "tokens_selected", "tokens_total"]
    assert info["confidence"].shape == info["entropy"].shape == (3, 8)
    assert info["current_ratio"] == 0.5 and info["tokens_total"] == 24
    assert info["tokens_selected"] == mask.sum() == 12
    metrics = scorer.get_metrics()
    assert (metrics["tokens_selected"], metrics["tokens_total"], metrics["selection"]) == (12, 24, selection)


def test_causal_scores_use_the_next_label():
    scorer = make(scoring="loss")
    ids = tokens()
    labels = ids.clone()
    labels[1, 2:5] = -100
    difficulty, mask, info = scorer(ids, targets=labels)
    log_p = scorer.router.logits.detach().log_softmax(-1)
    want = -log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(difficulty[:, :-1][counted], want[counted])
    assert not mask[:, -1].any() and not mask[:, :-1][~counted].any()
    assert info["tokens_total"] == 18


def test_masked_language_models_score_the_label_in_place():
    router = Fixed(torch.randn(3, 8, 16))
    router.loss_type = "ForMaskedLM"  # as transformers marks them
    ids = tokens()
    labels = torch.where(ids % 3 == 0, ids, -100)
    difficulty, mask, _ = make(router, 1.0, scoring="loss")(ids, targets=labels)
    log_p = router.logits.detach().log_softmax(-1)
    want = -log_p.gather(-1, ids[..., None])[..., 0]
    assert torch.equal(mask, labels != -100)
    torch.testing.assert_close(difficulty[mask], want[mask])
    assert not TruncatedRouter(zoo.style("bert")).shifts_labels and TruncatedRouter(zoo.style("llama")).shifts_labels


@pytest.mark.parametrize("scoring", ["entropy", "margin", "loss", "combined"])
def test_without_targets_no_token_sees_a_later_one(scoring):
    """A mask that steers the forward must not tell it the token to predict."""
    model = zoo.style("llama").eval()
    scorer = make(TruncatedRouter(model, 1), scoring=scoring)
    ids = zoo.ids()
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 100
    first, second = scorer(ids)[0], scorer(changed)[0]
    torch.testing.assert_close(first[:, :6], second[:, :6])
    assert not torch.allclose(first[:, 6:], second[:, 6:])
    told = [scorer(x, targets=x)[0] for x in (ids, changed)]
    if scoring in ("loss", "combined"):  # the control
        assert not torch.allclose(told[0][:, 5], told[1][:, 5])


def test_without_targets_the_loss_is_its_expectation():
    scorer = make(scoring="loss")
    difficulty, _, info = scorer(tokens())
    torch.testing.assert_close(difficulty, info["entropy"])


def test_padding_is_never_selected():
    ids = tokens()
    attention = torch.ones_like(ids)
    attention[0, 3:] = 0
    for selection in SELECTIONS:
        _, mask, info = make(ratio=1.0, selection=selection)(ids, attention_mask=attention)
        assert torch.equal(mask, attention.bool()) and info["tokens_total"] == 19


def test_minimum_per_sequence():
    logits = F.one_hot(torch.zeros(3, 8, dtype=torch.long), 16) * 40.0  # two sequences of certainty
    logits[0] = torch.randn(8, 16)
    _, mask, _ = make(Fixed(logits), 0.1, selection="sequence_aware", min_tokens_per_sequence=2)(tokens())
    assert (mask.sum(1) >= 2).all()


def test_fixed_quota_ignores_the_dynamic_threshold():
    arguments = {"dynamic_threshold": True, "warmup_steps": 0, "min_tokens_ratio": 0.4}
    router = make().router
    assert CGGRScorer(router, selection="fixed_quota", **arguments)(tokens())[2]["current_ratio"] == 0.4
    assert CGGRScorer(router, selection="topk", **arguments)(tokens())[2]["current_ratio"] > 0.4


def test_owns_no_router():
    model = zoo.style("llama")
    scorer = CGGRScorer(model)
    assert set(scorer.state_dict()) == {"step_count"} and not list(scorer.parameters())
    assert scorer.router is model


def test_null_routing_trains_the_selected_tokens_only():
    expert, x = nn.Linear(4, 4), torch.randn(3, 8, 4, requires_grad=True)
    _, mask, _ = make()(tokens())
    (expert(x) * mask[..., None]).sum().backward()
    assert torch.equal(x.grad.abs().sum(-1) > 0, mask)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_one_graph_with_its_router(name):
    scorer = CGGRScorer(TruncatedRouter(zoo.style(name), 2), warmup_steps=3)
    captured = EagerAndRecordGraphs()
    compiled = torch.compile(scorer, fullgraph=True, backend=captured)
    for seed in range(3):
        ids = zoo.ids(seed=seed)
        got, want = compiled(ids, targets=ids), scorer(ids, targets=ids)
        torch.testing.assert_close(got, want)
        scorer.step()
    assert len(captured.graphs) == 1


def test_a_forward_reads_nothing_back(monkeypatch):
    scorer = CGGRScorer(TruncatedRouter(zoo.style("llama"), 2))
    ids = zoo.ids()
    with monkeypatch.context() as patched:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"):
            patched.setattr(torch.Tensor, name, lambda *a, name=name, **k: pytest.fail(f"Tensor.{name} in a forward"))
        scorer(ids, targets=ids)


def test_bad_inputs():
    scorer = make()
    with pytest.raises(ValueError, match=r"input_ids must have shape \[B, S\]"):
        scorer(torch.zeros(2, 3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="targets must match input_ids"):
        scorer(tokens(), targets=tokens()[:, 1:])
    with pytest.raises(ValueError, match=r"router must return logits \[B, S, V\]"):
        scorer(tokens(4, 9))
    with pytest.raises(ValueError, match="the router must return logits"):
        make(Nothing())(tokens())
    with pytest.raises(ValueError, match="router must be a module"):
        CGGRScorer(3)


class Nothing(nn.Module):
    def forward(self, input_ids):
        return {}
