"""Every model family and every way to write the loss, against the plain PyTorch reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import FAMILIES, SEQ, VOCAB, compiled, family, make_batch
from reference import (
    TOLERANCE,
    Picks,
    Run,
    assert_same,
    assert_zero,
    backward,
    candidates,
    dense,
    hf_reference,
    named_leaves,
    reference,
    selected_loss,
    shift,
    worst,
)
from torch import Tensor
from training import gradient_of, picks, small

import cggr_compile

MODES = {
    "exact": {"gradient": "exact"},
    "stop": {"gradient": "routed", "kv_gradient": "stop"},
    "project": {"gradient": "routed", "kv_gradient": "project"},
}
RATIO = 0.25
# Depth is checked with one family and one program; what only varies them has two layers or one.
DEEP = ("llama", "outside")


def tiny(name: str) -> torch.nn.Module:
    return small(name, **({"num_hidden_layers": 3} if name in DEEP else {}))


def check_selection(selected: Tensor, valid: Tensor, slots: int) -> None:
    """Ascending candidates, all of them if there are no more than slots, then -1."""
    assert selected.dtype == torch.long and tuple(selected.shape) == (valid.shape[0], slots)
    for row, allowed in zip(selected.tolist(), valid, strict=True):
        used = [i for i in row if i >= 0]
        assert row == sorted(set(used)) + [-1] * (slots - len(used)), row
        assert all(allowed[i] for i in used), (row, allowed)
        assert len(used) == min(slots, int(allowed.sum())), (row, allowed)


def run_hf(model: torch.nn.Module, batch: dict[str, Any]) -> Run:
    return backward(model, model(**batch).loss)


def family_modes() -> list[Any]:
    """Without markers, ``exact``, what a family is matters to the selected loss alone: one of them is quick."""
    pairs = [(name, mode) for name in FAMILIES for mode in MODES]
    slow = pytest.mark.slow
    repeated = {("gpt2", "project"), ("mixtral", "stop")}

    def repeats(name: str, mode: str) -> bool:
        return (mode == "exact" and name not in DEEP) or (name, mode) in repeated

    return [pytest.param(*pair, marks=slow if repeats(*pair) else ()) for pair in pairs]


@pytest.mark.parametrize(("name", "mode"), family_modes())
def test_family_equals_reference(name: str, mode: str) -> None:
    model, batch = tiny(name), make_batch()
    compiled(model, min_tokens_ratio=RATIO, **MODES[mode])
    got = run_hf(model, batch)

    runtime = cggr_compile.runtime(model)
    chosen = picks(model)
    metrics = runtime.metrics()
    assert metrics["matched"] is True, metrics
    assert not torch._dynamo.utils.counters["graph_break"]
    check_selection(chosen.rows, candidates(shift(batch["labels"])), math.ceil(RATIO * SEQ))

    assert_same(got, hf_reference(model, batch, chosen, **MODES[mode]))
    for other in MODES:  # the check can fail: the two other definitions are far away
        if other != mode:
            error, where = worst(got, hf_reference(model, batch, chosen, **MODES[other]))
            assert error > 1e-3, f"{other} and {mode} cannot be told apart ({error:.1e} at {where})"


@pytest.mark.parametrize("name", models.slow_but(["llama", "gpt2"], FAMILIES))
def test_ratio_one_is_the_unmodified_model(name: str) -> None:
    model, batch = tiny(name), make_batch()
    compiled(model, min_tokens_ratio=1.0)
    assert_same(run_hf(model, batch), dense(model, batch))


@pytest.mark.parametrize("ratio", [RATIO, 1.0])
@pytest.mark.parametrize("name", models.OTHER_FAMILIES)
def test_other_family_is_never_wrong(name: str, ratio: float) -> None:
    """The selected loss as defined, or the unmodified model: whichever the metrics claim."""
    attention = "sdpa" if name in ("falcon", "llama4") else "eager"
    model, batch = family(name, attn_implementation=attention), make_batch()
    compiled(model, min_tokens_ratio=ratio, fallback="silent")
    got = run_hf(model, batch)
    runtime = cggr_compile.runtime(model)
    if ratio < 1.0 and runtime.metrics()["matched"]:
        assert_same(got, hf_reference(model, batch, picks(model), gradient=gradient_of(model)))
    else:
        assert_same(got, dense(model, batch))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_other_head_tying(name: str) -> None:
    """The families' own defaults are tested above; here the opposite."""
    one = {"n_layer" if name == "gpt2" else "num_hidden_layers": 1}
    tied = small(name, **one).config.tie_word_embeddings
    model, batch = small(name, tie_word_embeddings=not tied, **one), make_batch()
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared is not tied
    compiled(model, min_tokens_ratio=RATIO)
    got = run_hf(model, batch)
    assert_same(got, hf_reference(model, batch, picks(model)))


@pytest.mark.parametrize(
    ("name", "mode"), [("llama", "project"), pytest.param("gemma2", "exact", marks=pytest.mark.slow)]
)
def test_inductor_equals_reference(name: str, mode: str) -> None:
    model, batch = family(name, num_hidden_layers=1), make_batch()
    compiled(model, min_tokens_ratio=RATIO, compiler="inductor", **MODES[mode])
    got = run_hf(model, batch)
    assert cggr_compile.runtime(model).metrics()["matched"] is True
    assert_same(got, hf_reference(model, batch, picks(model), **MODES[mode]))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert_zero(run_hf(model, batch))


# ---------------------------------------------------------------------------------------------------------------
# Without Hugging Face: where the loss is, how it is written, how attention is written.


class Program:
    """A model of our own with a loss: `call` is compiled, `logits` stays eager."""

    def __init__(
        self,
        model: Any,
        call: Callable[..., Tensor] | None = None,
        *,
        shifted: bool = False,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        self.model, self.shifted, self.ignore_index = model, shifted, ignore_index
        self.label_smoothing = label_smoothing
        self.target = call if call is not None else model

    def batch(self, size: int = 2, seq: int = SEQ) -> tuple[Tensor, Tensor]:
        batch = make_batch(size, seq)
        labels = shift(batch["labels"]) if self.shifted else batch["labels"]
        return batch["input_ids"], labels.masked_fill(labels == -100, self.ignore_index)

    def aligned(self, labels: Tensor) -> Tensor:
        return labels if self.shifted else shift(labels, self.ignore_index)

    def logits(self, ids: Tensor) -> Tensor:
        if isinstance(self.model, models.Functional):
            return self.model(self.model.params, ids)
        return self.model._call_impl(ids)

    def reference(self, ids: Tensor, labels: Tensor, chosen: Picks, **mode: str) -> Run:
        return reference(
            self.model,
            lambda: self.logits(ids),
            self.aligned(labels),
            chosen,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            **mode,
        )

    def dense(self, ids: Tensor, labels: Tensor) -> Run:
        target = self.aligned(labels)
        logits = self.logits(ids)
        flat = F.cross_entropy(
            logits.reshape(-1, VOCAB),
            target.reshape(-1),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
        return backward(self.model, flat)


def loss_outside(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(ids)
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


def nanogpt() -> Program:
    return Program(models.NanoGPT(), shifted=True, ignore_index=-1)


def softmax_inside() -> Program:
    return Program(models.SlicedLoss(models.attend_softmax, fused=False, tied=False))


def outside(**kwargs: Any) -> Program:
    model = models.Decoder(**kwargs)
    return Program(model, lambda ids, labels: loss_outside(model, ids, labels))


def smoothed() -> Program:
    model = models.Decoder(fused=False, tied=False, bias=True)

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).view(-1, VOCAB), targets.view(-1), label_smoothing=0.1)

    return Program(model, step, shifted=True, label_smoothing=0.1)


def class_axis_second() -> Program:
    model = models.Decoder()

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).transpose(1, 2), targets)

    return Program(model, step, shifted=True)


def criterion() -> Program:
    """The loss is a module, the shift is contiguous()ed, the logits are float()ed."""
    model, loss = models.Decoder(models.attend_softmax), torch.nn.CrossEntropyLoss()

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(ids).float()[..., :-1, :].contiguous()
        return loss(logits.view(-1, VOCAB), labels[..., 1:].contiguous().view(-1))

    return Program(model, step)


def functional(**kwargs: Callable[..., Tensor]) -> Program:
    model = models.Functional(**kwargs)

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return loss_outside(lambda x: model(model.params, x), ids, labels)

    return Program(model, step)


PROGRAMS: dict[str, Callable[[], Program]] = {
    "nanogpt": nanogpt,
    "softmax-inside": softmax_inside,
    "outside": outside,
    "outside-softmax": lambda: outside(attend=models.attend_softmax, fused=False, tied=False),
    "outside-head-bias": lambda: outside(tied=False, bias=True, fused=False),
    "label-smoothing": smoothed,
    "criterion": criterion,
    "functional": functional,
    "functional-softmax": lambda: functional(attend=models.attend_softmax),
    "functional-indexing": lambda: functional(lookup=models.index_rows),
    "bidirectional": lambda: outside(attend=models.attend_bidirectional),
    "documents": lambda: outside(documents=True),
}
# Those that vary the loss or the head, not attention: where keys and values are stopped is the same for all of them.
LOSS_PROGRAMS = {"nanogpt", "outside-head-bias", "label-smoothing", "criterion", "functional-indexing"}


@pytest.fixture
def depth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.getfixturevalue("name") in DEEP:
        monkeypatch.setattr(models, "LAYERS", 3)
    elif request.getfixturevalue("name") in LOSS_PROGRAMS:
        monkeypatch.setattr(models, "LAYERS", 1)


def program_modes() -> list[Any]:
    pairs = [(name, mode) for name in PROGRAMS for mode in MODES]
    slow = pytest.mark.slow

    def repeats(name: str, mode: str) -> bool:
        return mode == "exact" or (mode == "stop" and name in {*LOSS_PROGRAMS, "outside-softmax", "functional-softmax"})

    return [pytest.param(*pair, marks=slow if repeats(*pair) else ()) for pair in pairs]


def loss_of(output: Any) -> Tensor:
    return output[1] if isinstance(output, tuple) else output


@pytest.mark.usefixtures("depth")
@pytest.mark.parametrize(("name", "mode"), program_modes())
def test_own_model_equals_reference(name: str, mode: str) -> None:
    program = PROGRAMS[name]()
    ids, labels = program.batch()
    if name == "documents":
        ids[:, [5, 11]] = 1
    step = compiled(program.target, min_tokens_ratio=RATIO, **MODES[mode])
    got = backward(program.model, loss_of(step(ids, labels)))

    runtime = cggr_compile.runtime(named_leaves(program.model))
    chosen = picks(named_leaves(program.model))
    assert runtime.metrics()["matched"] is True, runtime.metrics()
    valid = candidates(program.aligned(labels), ignore_index=program.ignore_index)
    check_selection(chosen.rows, valid, math.ceil(RATIO * SEQ))
    assert_same(got, program.reference(ids, labels, chosen, **MODES[mode]))
    inert = "exact" if mode != "exact" else "stop"
    assert worst(got, program.reference(ids, labels, chosen, **MODES[inert]))[0] > 1e-3


@pytest.mark.usefixtures("depth")
@pytest.mark.parametrize("name", models.slow_but(["nanogpt", "criterion", "functional", "documents"], PROGRAMS))
def test_own_model_at_ratio_one(name: str) -> None:
    program = PROGRAMS[name]()
    ids, labels = program.batch()
    step = compiled(program.target, min_tokens_ratio=1.0)
    assert_same(backward(program.model, loss_of(step(ids, labels))), program.dense(ids, labels))


def test_class_axis_second_is_never_wrong() -> None:
    """cross_entropy on [B, V, S]: rewritten or left alone, as the metrics say."""
    program = class_axis_second()
    ids, labels = program.batch()
    step = compiled(program.target, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(program.model, step(ids, labels))
    runtime = cggr_compile.runtime(named_leaves(program.model))
    if runtime.metrics()["matched"]:
        assert_same(got, program.reference(ids, labels, picks(named_leaves(program.model))))
    else:
        assert runtime.metrics()["fallback_reason"]
        assert_same(got, program.dense(ids, labels))


def test_hf_model_with_the_users_own_loss() -> None:
    model, batch = small("llama", num_hidden_layers=1), make_batch()

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return loss_outside(lambda x: model(input_ids=x, use_cache=False).logits, ids, labels)

    run = compiled(step, min_tokens_ratio=RATIO)
    got = backward(model, run(batch["input_ids"], batch["labels"]))
    runtime = cggr_compile.runtime(model)
    assert runtime.metrics()["matched"] is True, runtime.metrics()
    assert_same(got, hf_reference(model, batch, picks(model)))


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    size=st.integers(1, 4),
    seq=st.integers(2, 24),
    ratio=st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.9, 1 / 3]),
    ignored=st.integers(0, 2**31 - 1),
)
def test_any_shape(size: int, seq: int, ratio: float, ignored: int) -> None:
    torch._dynamo.reset()
    program = nanogpt()
    ids, targets = program.batch(size, seq)
    drop = torch.rand(targets.shape, generator=torch.Generator().manual_seed(ignored)) < 0.4
    targets = targets.masked_fill(drop, -1)
    step = compiled(program.target, min_tokens_ratio=ratio)
    got = backward(program.model, step(ids, targets)[1])
    chosen = picks(named_leaves(program.model))
    check_selection(chosen.rows, candidates(targets, ignore_index=-1), math.ceil(round(ratio * seq, 6)))
    assert_same(got, program.reference(ids, targets, chosen))


# ---------------------------------------------------------------------------------------------------------------
# The reference itself.


@pytest.mark.parametrize("mode", MODES)
def test_reference_routes_as_defined(mode: str) -> None:
    """Routed: the gradient of every hidden state is exactly zero on unselected rows; exact: it is not."""
    model, batch = family("llama"), make_batch()
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_full_backward_pre_hook(lambda _, grads: seen.append(grads[0].abs().sum(-1)))
    selected = torch.tensor([[4, 7, 9, -1], [0, 3, 8, 14]])
    run = hf_reference(model, batch, selected, **MODES[mode])
    hard = torch.zeros(2, SEQ, dtype=torch.bool)
    hard[0, [4, 7, 9]] = True
    hard[1, [0, 3, 8, 14]] = True
    last, *earlier = seen
    assert len(seen) == len(model.model.layers) and (last[~hard] == 0).all() and (last[hard] > 0).all()
    for grads in earlier:
        assert bool((grads[~hard] == 0).all()) is (mode != "exact")

    logits = model(input_ids=batch["input_ids"]).logits
    target = shift(batch["labels"])
    by_hand = torch.stack([-logits[b, t].log_softmax(-1)[target[b, t]] for b, t in hard.nonzero().tolist()]).mean()
    torch.testing.assert_close(run.loss, by_hand.detach())
    total = selected_loss(logits, target, selected, num_items=50.0)
    valid = candidates(target)
    torch.testing.assert_close(total, by_hand * valid.sum() / 50.0)


def test_reference_grid_is_dense_when_everything_is_selected() -> None:
    model, batch = family("gemma2"), make_batch()
    everything = torch.arange(SEQ).repeat(2, 1)
    valid = candidates(shift(batch["labels"]))
    selected = torch.where(valid, everything, -1)
    assert_same(hf_reference(model, batch, selected, gradient="exact"), dense(model, batch), TOLERANCE)
