"""What a training loop does around a compiled model: padding, accumulation, autocast, evaluation, state, errors."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from models import SEQ, VOCAB, backend, compiled, family, make_batch
from reference import (
    Run,
    assert_same,
    assert_zero,
    backward,
    candidates,
    collect,
    dense,
    difficulty,
    eager_call,
    hard_mask,
    hardest,
    hf_reference,
    overall,
    reference,
    routing,
    selected_loss,
    shift,
    worst,
)
from torch import Tensor, nn

import cggr_compile

RATIO = 0.25
SLOTS = math.ceil(RATIO * SEQ)
Batch = dict[str, Any]


def small(name: str = "llama", **overrides: Any) -> nn.Module:
    layers = "n_layer" if name == "gpt2" else "num_hidden_layers"
    return family(name, **{layers: 2, **overrides})


def selected(model: Any) -> Tensor:
    return cggr_compile.runtime(model).selected.clone()


def metrics(model: Any) -> dict[str, Any]:
    return cggr_compile.runtime(model).metrics()


def check_against_reference(model: nn.Module, batch: Batch, **mode: str) -> Run:
    got = backward(model, model(**batch).loss)
    assert metrics(model)["matched"] is True, metrics(model)
    assert_same(got, hf_reference(model, batch, selected(model), **mode))
    return got


@contextlib.contextmanager
def complaints() -> Iterator[list[str]]:
    """Warnings that name the package, whether warned or logged."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                found.append(record.getMessage())

    handler, logger = Handler(), logging.getLogger("cggr_compile")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield found
        finally:
            logger.removeHandler(handler)
            found += [str(w.message) for w in caught if "cggr" in str(w.message).lower()]


# ---------------------------------------------------------------------------------------------------------------
# Padding and ignored labels


def padded(side: str, *, size: int = 2, seq: int = SEQ, ignored_labels: bool = True) -> Batch:
    """The first sequence has 6 positions of padding: on one side, or scattered as holes."""
    batch: Batch = make_batch(size, seq)
    mask = torch.ones(size, seq, dtype=torch.long)
    where = {"right": slice(seq - 6, seq), "left": slice(0, 6), "holes": [1, 4, 5, 8, 11, 12]}[side]
    mask[0, where] = 0
    if ignored_labels:
        batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    return {**batch, "attention_mask": mask}


@pytest.mark.parametrize(
    ("side", "padding", "kv_gradient"),
    [
        ("right", "auto", "stop"),
        ("right", "right", "project"),
        ("right", "any", "project"),
        ("left", "auto", "stop"),
        ("left", "any", "project"),
        ("holes", "auto", "project"),
    ],
)
def test_padding(side: str, padding: str, kv_gradient: str) -> None:
    model, batch = small(), padded(side)
    compiled(model, min_tokens_ratio=RATIO, padding=padding, kv_gradient=kv_gradient)
    for _ in range(2):
        check_against_reference(model, batch, kv_gradient=kv_gradient)
        chosen = selected(model)
        valid = candidates(shift(batch["labels"]), batch["attention_mask"])
        for row, allowed in zip(chosen.tolist(), valid, strict=True):
            assert all(allowed[i] for i in row if i >= 0)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "llama-eager"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_in_other_families(side: str, name: str) -> None:
    model, batch = family(name), padded(side)
    compiled(model, min_tokens_ratio=RATIO)
    check_against_reference(model, batch)


def test_padding_whose_labels_are_not_ignored() -> None:
    """A careless collator: labels = input_ids. Padding is still no candidate: attention_mask says so."""
    model, batch = small(), padded("left", ignored_labels=False)
    compiled(model, min_tokens_ratio=0.9)
    check_against_reference(model, batch)
    valid = candidates(shift(batch["labels"]), batch["attention_mask"])
    assert int((selected(model) >= 0).sum()) == int(valid.sum().clamp_max(2 * math.ceil(0.9 * SEQ)))
    assert all(valid[b, i] for b, row in enumerate(selected(model).tolist()) for i in row if i >= 0)


@pytest.mark.parametrize("first", ["full", "right"])
def test_padding_of_another_kind_in_a_later_batch(first: str) -> None:
    """What `auto` concluded from the first batch must not make a later one silently wrong."""
    model = small()
    start = {**padded("right"), "attention_mask": torch.ones(2, SEQ, dtype=torch.long)}
    compiled(model, min_tokens_ratio=RATIO)
    check_against_reference(model, start if first == "full" else padded("right"))
    for side in ("right", "left"):
        try:
            check_against_reference(model, padded(side))
        except RuntimeError as error:
            assert side == "left" and "padding" in str(error).lower(), error
            model.zero_grad()


def test_broken_promise_of_right_padding_raises() -> None:
    model, batch = small(), padded("left")
    compiled(model, min_tokens_ratio=RATIO, padding="right")
    with pytest.raises(RuntimeError, match=r"(?i)padding"):
        backward(model, model(**batch).loss)


@pytest.mark.parametrize("seq", [12, 13])
def test_padding_at_ratio_one(seq: int) -> None:
    for side in ("right", "left"):
        model, batch = small(), padded(side, seq=seq)
        compiled(model, min_tokens_ratio=1.0)
        assert_same(backward(model, model(**batch).loss), dense(model, batch))


def test_same_tensor_as_input_and_labels() -> None:
    model, ids = small(), make_batch()["input_ids"]
    compiled(model, min_tokens_ratio=RATIO)
    check_against_reference(model, {"input_ids": ids, "labels": ids})


def test_few_labels() -> None:
    """One sequence has fewer labels than slots, one has none: the mean is over what there is."""
    model, batch = small(), make_batch(3)
    batch["labels"][0, :-2] = -100
    batch["labels"][1] = -100
    compiled(model, min_tokens_ratio=RATIO)
    check_against_reference(model, batch)
    used = (selected(model) >= 0).sum(1).tolist()
    assert used == [2, 0, SLOTS]


@pytest.mark.parametrize("gradient", ["exact", "routed"])
def test_no_label_at_all(gradient: str) -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, gradient=gradient)
    check_against_reference(model, batch, gradient=gradient)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert_zero(backward(model, model(**batch).loss))
    assert (selected(model) == -1).all()
    assert all(not (isinstance(v, float) and math.isnan(v)) for v in metrics(model).values()), metrics(model)


@pytest.mark.parametrize("num_items", [0, 40])
def test_no_label_in_a_micro_batch(num_items: int) -> None:
    """Accumulation: this micro-batch has no label, or (0) none of them has."""
    model, batch = small(), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    compiled(model, min_tokens_ratio=RATIO)
    assert_zero(backward(model, model(**batch, num_items_in_batch=torch.tensor(num_items)).loss))


# ---------------------------------------------------------------------------------------------------------------
# Normalisation, accumulation


def micro_batches() -> list[Batch]:
    first, second = make_batch(2, seed=3), make_batch(2, seed=4)
    second["labels"][:, : SEQ // 2] = -100
    return [first, second]


@pytest.mark.parametrize("kind", ["int", "tensor"])
@pytest.mark.parametrize("order", ["interleaved", "forwards-first"])
def test_gradient_accumulation(order: str, kind: str) -> None:
    model, batches = small(), micro_batches()
    total = sum(int((shift(b["labels"]) != -100).sum()) for b in batches)
    for batch in batches:
        batch["num_items_in_batch"] = total if kind == "int" else torch.tensor(total)
    compiled(model, min_tokens_ratio=RATIO)

    losses, chosen = [], []
    for batch in batches:
        losses.append(model(**batch).loss)
        chosen.append(selected(model))
        if order == "interleaved":
            losses[-1].backward()
    if order == "forwards-first":
        for loss in losses:
            loss.backward()
    assert metrics(model)["matched"] is True, metrics(model)
    got = collect(model, sum(losses))

    parts = [hf_reference(model, batch, picks) for batch, picks in zip(batches, chosen, strict=True)]
    want = Run(sum(p.loss for p in parts), {n: sum(p.grads[n] for p in parts) for n in parts[0].grads})
    assert not torch.equal(chosen[0], chosen[1])
    assert_same(got, want)


def test_num_items_at_ratio_one() -> None:
    model, batch = small(), {**make_batch(), "num_items_in_batch": torch.tensor(77)}
    compiled(model, min_tokens_ratio=1.0)
    assert_same(backward(model, model(**batch).loss), dense(model, batch))


def test_own_normaliser() -> None:
    """cross_entropy(reduction="sum") divided by the user's own number, in the user's own function."""
    model, batch = small(), make_batch()
    count = 50

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.reshape(-1, VOCAB), labels[:, 1:].reshape(-1), reduction="sum") / count

    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, run(batch["input_ids"], batch["labels"]))
    full = {**batch, "num_items_in_batch": torch.tensor(count)}
    matched = metrics(model)["matched"]
    assert_same(got, hf_reference(model, full, selected(model)) if matched else dense(model, full))


# ---------------------------------------------------------------------------------------------------------------
# Autocast, checkpointing, adapters, randomness


@pytest.mark.parametrize(("mode", "compiler"), [("exact", "eager"), ("routed", "eager"), ("routed", "inductor")])
def test_autocast(mode: str, compiler: str) -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, gradient=mode, compiler=compiler)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    assert loss.dtype == torch.float32
    got = backward(model, loss)
    assert metrics(model)["matched"] is True, metrics(model)
    chosen = selected(model)
    full_precision = hf_reference(model, batch, chosen, gradient=mode)
    with torch.autocast("cpu", torch.bfloat16):
        eager = hf_reference(model, batch, chosen, gradient=mode)
    assert abs(got.loss - eager.loss) < 2e-2 * abs(eager.loss)
    rounding = overall(eager, full_precision)
    assert 1e-4 < rounding < 5e-2, "autocast did nothing, or the reference is unusable"
    assert overall(got, full_precision) < 1.5 * rounding, (overall(got, full_precision), rounding)
    other = hf_reference(model, batch, chosen, gradient="routed" if mode == "exact" else "exact")
    assert overall(got, other) > 3 * rounding


def test_bf16_weights() -> None:
    model, batch = family("llama").to(torch.bfloat16), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    got = backward(model, model(**batch).loss)
    assert metrics(model)["matched"] is True, metrics(model)
    assert {g.dtype for g in got.grads.values()} == {torch.bfloat16}
    eager = hf_reference(model, batch, selected(model))
    exact = hf_reference(copy.deepcopy(model).float(), batch, selected(model))
    assert overall(got, exact) < 1.5 * overall(eager, exact)


def test_checkpointing() -> None:
    model, batch = small(num_hidden_layers=3), make_batch()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False  # transformers' own warning about it would break the graph
    compiled(model, min_tokens_ratio=RATIO)
    for _ in range(2):
        check_against_reference(model, batch)


@pytest.mark.parametrize("mode", [{"gradient": "exact"}, {"kv_gradient": "stop"}, {"kv_gradient": "project"}], ids=str)
def test_lora(mode: dict[str, str]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], lora_dropout=0.0)
    model = peft.get_peft_model(small(), config)
    models.randomise(model)
    batch = make_batch()
    compiled(model, min_tokens_ratio=RATIO, **mode)
    got = backward(model, model(**batch).loss)
    assert metrics(model)["matched"] is True, metrics(model)
    assert len(got.grads) == 2 * 2 * 4
    assert_same(got, hf_reference(model, batch, selected(model), **mode))


def test_frozen_parameters() -> None:
    """Only the last block trains: nothing of the rest gets a gradient."""
    model, batch = small(), make_batch()
    model.requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    compiled(model, min_tokens_ratio=RATIO)
    check_against_reference(model, batch)


def test_dropout_model_trains_and_selection_leaves_the_global_generator_alone() -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    model(**batch).loss.backward()
    before = torch.get_rng_state()
    model(**batch).loss.backward()
    assert torch.equal(torch.get_rng_state(), before)

    dropping = small("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    compiled(dropping, min_tokens_ratio=RATIO)
    losses = [backward(dropping, dropping(**batch).loss).loss for _ in range(2)]
    assert metrics(dropping)["matched"] is True, metrics(dropping)
    assert all(torch.isfinite(loss) for loss in losses)


def test_packed_documents() -> None:
    """Positions that restart, one row: attention stays inside documents, in the compiled model as eagerly."""
    model, batch = small(), make_batch(1)
    batch["position_ids"] = torch.cat([torch.arange(6), torch.arange(SEQ - 6)])[None]
    compiled(model, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, model(**batch, use_cache=False).loss)
    if metrics(model)["matched"]:
        assert_same(got, hf_reference(model, batch, selected(model)))
    else:
        assert_same(got, dense(model, {**batch, "use_cache": False}))


# ---------------------------------------------------------------------------------------------------------------
# Shapes, and how often we compile


def test_shapes_and_compilations() -> None:
    model = small()
    compiled(model, min_tokens_ratio=RATIO)
    shapes = [(2, 16), (3, 16), (2, 24), (3, 24), (2, 16), (3, 24), (1, 16)]
    graphs = []
    for size, seq in shapes:
        check_against_reference(model, make_batch(size, seq))
        assert tuple(selected(model).shape) == (size, math.ceil(RATIO * seq))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert all(later <= n + 1 for n, later in enumerate(graphs)), graphs
    assert graphs[3] == graphs[5], f"a shape seen before was compiled again: {graphs}"
    assert graphs[-1] <= 5, graphs
    assert not torch._dynamo.utils.counters["graph_break"]


def test_steps_do_not_recompile() -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert sum(losses[3:]) < sum(losses[:3])


def test_long_sequence_slots_are_exact() -> None:
    """ceil(ratio * S) by integer arithmetic: 0.1 * 30 is 3, not 4."""
    model = small()
    compiled(model, min_tokens_ratio=0.1)
    model(**make_batch(1, 30, ignored=False)).loss.backward()
    assert tuple(selected(model).shape) == (1, 3)


# ---------------------------------------------------------------------------------------------------------------
# Evaluation, generation, checkpoints


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_evaluation_is_untouched_inductor(grad: bool) -> None:
    model, batch = small(), make_batch()
    plain = copy.deepcopy(model)
    plain.compile()
    compiled(model, min_tokens_ratio=RATIO, compiler="inductor")
    for training in (False,) if grad else (False, True):
        model.train(training), plain.train(training)
        with torch.set_grad_enabled(grad), complaints() as heard:
            got, want = model(**batch), plain(**batch)
            assert got.logits.shape == (2, SEQ, VOCAB)
            assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)
            if not grad:
                got, want = model(batch["input_ids"]), plain(batch["input_ids"])
                assert got.loss is None and torch.equal(got.logits, want.logits)
        assert not heard, heard


def test_train_eval_train() -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    check_against_reference(model, batch)
    step = metrics(model)["step"]

    model.eval()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            output = model(**batch)
            want = eager_call(model, **batch)
        torch.testing.assert_close(output.loss, want.loss)
        torch.testing.assert_close(output.logits, want.logits)
    assert metrics(model)["step"] == step

    model.train()
    check_against_reference(model, batch)
    assert metrics(model)["step"] == step + 1


def test_training_without_labels() -> None:
    """Logits for a loss outside of the compiled region: the dense model, and its gradient."""
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, fallback="silent")
    logits = model(batch["input_ids"]).logits
    assert logits.shape == (2, SEQ, VOCAB)
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), batch["labels"][:, 1:].reshape(-1))
    assert_same(backward(model, loss), dense(model, batch))


def test_generate() -> None:
    model, batch = small(), make_batch()
    plain = copy.deepcopy(model).eval()
    compiled(model, min_tokens_ratio=RATIO)
    model(**batch).loss.backward()
    prompt = batch["input_ids"][:, :5]
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model.eval()
    with complaints() as heard:
        assert torch.equal(model.generate(prompt, **settings), plain.generate(prompt, **settings))
    assert not heard, heard


def test_state_dict_is_the_models_own() -> None:
    model, batch = small(), make_batch()
    keys = list(model.state_dict())
    compiled(model, min_tokens_ratio=RATIO)
    assert list(model.state_dict()) == keys
    model(**batch).loss.backward()
    assert list(model.state_dict()) == keys
    assert {n for n, _ in model.named_buffers()} == {n for n, _ in small().named_buffers()}
    small().load_state_dict(model.state_dict())


def test_torch_compile_wrapper() -> None:
    """torch.compile(model) instead of model.compile(): the runtime is found from either object."""
    model, batch = small(), make_batch()
    wrapped = compiled(model, in_place=False, min_tokens_ratio=RATIO)
    got = backward(model, wrapped(**batch).loss)
    assert_same(got, hf_reference(model, batch, selected(wrapped)))


def test_two_models_have_two_runtimes() -> None:
    first, second, batch = small(), small("gpt2"), make_batch()
    compiled(first, min_tokens_ratio=RATIO)
    compiled(second, min_tokens_ratio=0.5)
    first(**batch).loss.backward()
    before = selected(first)
    second(**batch).loss.backward()
    second(**batch).loss.backward()
    assert torch.equal(selected(first), before)
    assert tuple(selected(second).shape) == (2, SEQ // 2)
    assert (metrics(first)["step"], metrics(second)["step"]) == (1, 2)


# ---------------------------------------------------------------------------------------------------------------
# Outputs


@pytest.mark.parametrize("return_dict", [True, False])
def test_logits_drop(return_dict: bool) -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    output = model(**batch, return_dict=return_dict, use_cache=False)
    logits = output.logits if return_dict else output[1]
    assert tuple(logits.shape) == (2, 0, VOCAB) and not logits.requires_grad


def test_logits_detach() -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, logits="detach")
    output = model(**batch)
    assert not output.logits.requires_grad
    torch.testing.assert_close(output.logits, eager_call(model, **batch).logits.detach())
    assert_same(backward(model, output.loss), hf_reference(model, batch, selected(model)))


def test_other_outputs_carry_no_gradient() -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    # first eagerly: when transformers installs its hooks, at the first such call, it breaks the graph itself
    want = eager_call(model, **batch, output_hidden_states=True, use_cache=True)
    output = model(**batch, output_hidden_states=True, use_cache=True)
    assert len(output.hidden_states) == len(want.hidden_states)
    for got, expected in zip(output.hidden_states, want.hidden_states, strict=True):
        assert not got.requires_grad
        torch.testing.assert_close(got, expected.detach())
    for got, expected in zip(output.past_key_values.layers, want.past_key_values.layers, strict=True):
        assert not got.keys.requires_grad and not got.values.requires_grad
        torch.testing.assert_close(got.keys, expected.keys.detach())
        torch.testing.assert_close(got.values, expected.values.detach())
    assert_same(backward(model, output.loss), hf_reference(model, batch, selected(model)))


def test_graph_break_of_transformers_own_is_never_wrong() -> None:
    """The first call for hidden states (see above): model and loss are in two graphs, so nothing is rewritten."""
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, fallback="silent")
    for _ in range(2):
        output = model(**batch, output_hidden_states=True)
        got = backward(model, output.loss)
        if metrics(model)["matched"]:
            assert_same(got, hf_reference(model, batch, selected(model)))
        else:
            assert_same(got, dense(model, batch))


# ---------------------------------------------------------------------------------------------------------------
# Losses that must not be silently changed


def cross_entropy_and(extra: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)) + extra(logits)

    return loss


def unreduced(logits: Tensor, labels: Tensor) -> Tensor:
    nll = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), reduction="none")
    weight = torch.linspace(0.5, 1.5, nll.numel())
    return (nll * weight).sum() / weight.sum()


def class_weights(logits: Tensor, labels: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 1.5, VOCAB)
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), weight=weight)


def two_heads_of_time(logits: Tensor, labels: Tensor) -> Tensor:
    """Predicts the next token and the one after from the same logits."""
    one = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
    return one + 0.5 * F.cross_entropy(logits[:, :-2].reshape(-1, VOCAB), labels[:, 2:].reshape(-1))


def per_sequence(logits: Tensor, labels: Tensor) -> Tensor:
    """Sequence classification by the last token: not a token-level loss."""
    return F.cross_entropy(logits[:, -1], labels[:, -1].clamp_min(0))


def soft_targets(logits: Tensor, labels: Tensor) -> Tensor:
    target = F.one_hot(labels.clamp_min(0), VOCAB).float() * 0.9 + 0.1 / VOCAB
    return F.cross_entropy(logits.reshape(-1, VOCAB), target.reshape(-1, VOCAB))


def temperature_from_data(logits: Tensor, labels: Tensor) -> Tensor:
    scaled = logits / (1 + labels[:, :1, None].float().abs() / 100)
    return F.cross_entropy(scaled[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


def mixed_positions(logits: Tensor, labels: Tensor) -> Tensor:
    smooth = logits + 0.5 * logits.roll(1, dims=1)
    return F.cross_entropy(smooth[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


def reversed_time(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flip(1)[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "z-loss": cross_entropy_and(lambda logits: 1e-2 * logits.logsumexp(-1).square().mean()),
    "logit-penalty": cross_entropy_and(lambda logits: 1e-2 * logits.square().mean()),
    "reduction-none": unreduced,
    "class-weights": class_weights,
    "two-losses": two_heads_of_time,
    "per-sequence": per_sequence,
    "soft-targets": soft_targets,
    "temperature": temperature_from_data,
    "mixed-positions": mixed_positions,
    "reversed": reversed_time,
}


@pytest.mark.parametrize("name", LOSSES)
def test_unusual_loss_is_the_users_loss(name: str) -> None:
    """None of these is the selected loss we define, so the only right result is the unmodified one."""
    model, batch = models.Decoder(), make_batch()

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return LOSSES[name](model(ids), labels)

    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    args = batch["input_ids"], batch["labels"]
    got = backward(model, run(*args))
    assert_same(got, backward(model, step(*args)))
    assert metrics(model)["matched"] is False
    assert metrics(model)["fallback_reason"]


def test_loss_plus_something_else_keeps_both() -> None:
    """A weight penalty does not touch the logits: the token loss is selected, the penalty is exact."""
    model, batch = models.Decoder(), make_batch()

    def penalty() -> Tensor:
        return 0.1 * model.blocks[0].up.weight.square().sum()

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return 2.0 * cross_entropy_and(lambda _: torch.zeros(()))(model(ids), labels) + penalty()

    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, run(batch["input_ids"], batch["labels"]))
    if metrics(model)["matched"]:
        target = shift(batch["labels"])
        with routing(model, hard_mask(selected(model), SEQ), "routed", "project"):
            want = backward(model, 2.0 * selected_loss(model(batch["input_ids"]), target, selected(model)) + penalty())
    else:
        want = backward(model, step(batch["input_ids"], batch["labels"]))
    assert_same(got, want)


def test_hidden_state_penalty_is_not_dropped() -> None:
    """A loss on hidden states beside the cross-entropy needs the gradient of every position."""
    model, batch = small(), make_batch()

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        output = model(input_ids=ids, labels=labels, output_hidden_states=True, use_cache=False)
        return output.loss + 0.1 * output.hidden_states[1].square().mean()

    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, run(batch["input_ids"], batch["labels"]))
    if not metrics(model)["matched"]:
        assert_same(got, backward(model, step(batch["input_ids"], batch["labels"])))
        return
    with routing(model, hard_mask(selected(model), SEQ), "routed", "project"):
        output = model(batch["input_ids"], output_hidden_states=True, use_cache=False)
        loss = selected_loss(output.logits, shift(batch["labels"]), selected(model))
        want = backward(model, loss + 0.1 * output.hidden_states[1].square().mean())
    assert_same(got, want)


# ---------------------------------------------------------------------------------------------------------------
# Selection


def test_seed_and_steps() -> None:
    def picks(seed: int, steps: int = 4) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(seed + 17 * steps)  # the global generator plays no part
        model, batch = small(), make_batch(4)
        compiled(model, min_tokens_ratio=RATIO, seed=seed)
        out = []
        for _ in range(steps):
            backward(model, model(**batch).loss)
            out.append(selected(model))
        return out

    first, again, other = picks(1), picks(1, 5), picks(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again[:4], strict=True))
    assert not torch.equal(first[0], other[0])
    assert len({tuple(p.flatten().tolist()) for p in first}) == len(first)
    assert len({tuple(row) for row in first[0].tolist()}) > 1, "every sequence got the same positions"


def test_random_selection_is_uniform() -> None:
    model, batch = small(num_hidden_layers=2), make_batch(8, ignored=False)
    compiled(model, min_tokens_ratio=RATIO, scoring="random")
    counts, rounds = torch.zeros(SEQ), 60
    for _ in range(rounds):
        model(**batch)
        counts += torch.bincount(selected(model).flatten(), minlength=SEQ)
    assert counts[-1] == 0
    expected = rounds * 8 * SLOTS / (SEQ - 1)
    # five standard deviations of a binomial
    assert (counts[:-1] - expected).abs().max() < 5 * math.sqrt(expected), counts


def test_runtime_state_resumes_selection() -> None:
    model, batch = small(), make_batch()
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
    fresh = small()
    compiled(fresh, min_tokens_ratio=RATIO, seed=9)
    cggr_compile.runtime(fresh).load_state_dict(state)
    backward(fresh, fresh(**batch).loss)
    assert torch.equal(selected(fresh), want)


def test_manual_advance() -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, advance="manual")
    backward(model, model(**batch).loss)
    first = selected(model)
    backward(model, model(**batch).loss)
    assert torch.equal(selected(model), first) and metrics(model)["step"] == 0
    cggr_compile.runtime(model).step()
    backward(model, model(**batch).loss)
    assert not torch.equal(selected(model), first) and metrics(model)["step"] == 1


@pytest.mark.parametrize("layers", ["full", 1])
@pytest.mark.parametrize("scoring", ["entropy", "margin", "loss", "combined"])
def test_topk_selects_the_hardest(scoring: str, layers: str | int) -> None:
    model, batch = family("gemma2"), padded("right", size=3)
    batch["labels"][1, 3:8] = -100
    compiled(model, min_tokens_ratio=RATIO, selection="topk", scoring=scoring, router_layers=layers)
    check_against_reference(model, batch)

    target = shift(batch["labels"])
    valid = candidates(target, batch["attention_mask"])
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
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO, selection=selection, router_layers="full")
    check_against_reference(model, batch)
    target = shift(batch["labels"])
    with torch.no_grad():
        scores = difficulty(eager_call(model, batch["input_ids"]).logits, target, "combined")
    assert torch.equal(selected(model), hardest(scores, candidates(target), SLOTS))


def test_metrics() -> None:
    model, batch = small(), make_batch()
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
    assert (got["scoring"], got["selection"]) == ("combined", "random")


# ---------------------------------------------------------------------------------------------------------------
# Errors that name what is wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_token_ratio": 0.5}, "min_token_ratio.*min_tokens_ratio"),
        ({"kv_grad": "stop"}, "kv_grad.*kv_gradient"),
        ({"min_tokens_ratio": 0.0}, "min_tokens_ratio"),
        ({"min_tokens_ratio": 1.5}, "min_tokens_ratio"),
        ({"min_tokens_ratio": float("nan")}, "min_tokens_ratio"),
        ({"min_tokens_ratio": "0.5"}, "min_tokens_ratio"),
        ({"min_tokens_ratio": True}, "min_tokens_ratio"),
        ({"scoring": "entropi"}, "scoring.*entropy"),
        ({"selection": "best"}, "selection"),
        ({"selection": "topk", "scoring": "random"}, "scoring"),
        ({"router_layers": 0}, "router_layers"),
        ({"router_layers": "all"}, "router_layers"),
        ({"gradient": None}, "gradient"),
        ({"kv_gradient": "detach"}, "kv_gradient"),
        ({"logits": True}, "logits"),
        ({"padding": "leftish"}, "padding"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"advance": "never"}, "advance"),
        ({"fallback": "raise"}, "fallback"),
        ({"compiler": "gcc"}, "compiler"),
        ({"dump_dir": 3}, "dump_dir"),
    ],
    ids=str,
)
def test_wrong_option(options: dict[str, Any], message: str) -> None:
    model, batch = small(num_hidden_layers=1), make_batch()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        model.compile(backend=backend(), options={"compiler": "eager", **options})
        model(**batch)


def test_more_router_layers_than_the_model_has() -> None:
    model, batch = small(), make_batch()
    with pytest.raises(ValueError, match="router_layers"):
        compiled(model, router_layers=3)(**batch)


@pytest.mark.parametrize("bad", [VOCAB, -7])
def test_label_outside_the_vocabulary(bad: int) -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    model(**batch).loss.backward()
    batch["labels"][1, 3] = bad
    with pytest.raises(ValueError, match="labels"):
        model(**batch)


def test_labels_of_another_shape() -> None:
    """torch itself refuses while Dynamo traces the model, before any backend: then its message names the shapes."""
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    batch["labels"] = batch["labels"][:, :-3]
    with pytest.raises(Exception) as caught:
        model(**batch)
    if isinstance(caught.value, ValueError) and "cggr" in str(caught.traceback[-1].path):
        assert "labels" in str(caught.value)
    else:
        numbers = set(re.findall(r"\d+", str(caught.value)))
        assert {str(2 * SEQ), str(2 * (SEQ - 3))} <= numbers, caught.value


# ---------------------------------------------------------------------------------------------------------------
# Models that do not match


def mlp_step() -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 5))

    def step(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(x), labels)

    return model, step


def test_fallback_warns_once_and_is_plain() -> None:
    model, step = mlp_step()
    with complaints() as heard:
        run = compiled(step, min_tokens_ratio=RATIO, fallback="warn")
        for size in (4, 6, 4):
            x, labels = torch.randn(size, 8), torch.randint(0, 5, (size,))
            assert_same(backward(model, run(x, labels)), backward(model, step(x, labels)))
    assert len(heard) == 1, heard
    assert metrics(model)["matched"] is False
    assert metrics(model)["fallback_reason"]


def test_fallback_silent() -> None:
    model, step = mlp_step()
    with complaints() as heard:
        run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
        x, labels = torch.randn(4, 8), torch.randint(0, 5, (4,))
        assert_same(backward(model, run(x, labels)), backward(model, step(x, labels)))
    assert not heard, heard


def test_fallback_error() -> None:
    _, step = mlp_step()
    run = compiled(step, min_tokens_ratio=RATIO, fallback="error")
    with pytest.raises(Exception, match=r"(?i)loss|stack|block|layer"):
        run(torch.randn(4, 8), torch.randint(0, 5, (4,)))


def test_stack_without_attention_is_never_wrong() -> None:
    """A recurrent model mixes tokens where no attention is: routing would not be the gradient we define."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(VOCAB, 16), "head": nn.Linear(16, VOCAB)})

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        x = model["embed"](ids)
        for _ in range(3):  # position t sees the mean of the past
            x = x + torch.tanh(x.cumsum(1) / 8)
        logits = model["head"](x)
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))

    batch = make_batch()
    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    args = batch["input_ids"], batch["labels"]
    assert_same(backward(model, run(*args)), backward(model, step(*args)))
    assert metrics(model)["matched"] is False


class Convolved(models.Decoder):
    """A causal convolution over tokens in every block, beside attention."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.conv = nn.Conv1d(models.HIDDEN, models.HIDDEN, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
            x = x + 0.1 * block.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
        return self.lm_head(self.ln_f(x))


def test_tokens_mixed_outside_attention_are_never_wrong() -> None:
    """Rewritten, it must equal the reference, which routes at attention only; else it is the dense model."""
    model, batch = Convolved(), make_batch()

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_and(lambda _: torch.zeros(()))(model(ids), labels)

    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, run(batch["input_ids"], batch["labels"]))
    if metrics(model)["matched"]:
        want = reference(model, lambda: model(batch["input_ids"]), shift(batch["labels"]), selected(model))
    else:
        want = backward(model, step(batch["input_ids"], batch["labels"]))
    assert_same(got, want)


def test_control_a_wrong_selection_is_noticed() -> None:
    model, batch = small(), make_batch()
    compiled(model, min_tokens_ratio=RATIO)
    got = backward(model, model(**batch).loss)
    wrong = selected(model)
    free = [i for i in range(SEQ - 1) if i not in wrong[1].tolist()]
    wrong[1, 0] = free[0]
    assert worst(got, hf_reference(model, batch, wrong.sort(1).values))[0] > 1e-3


# ---------------------------------------------------------------------------------------------------------------
# Code as people write it


class Edited(models.Decoder):
    """A decoder that changes tensors in place, in one of several ways."""

    def __init__(self, edit: str) -> None:
        super().__init__(tied=False)
        self.edit = edit
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def residual(self, x: Tensor) -> Tensor:
        if self.edit == "method":  # the result of add_ is not used
            x.add_(0.5 * x.tanh())
        elif self.edit == "view":
            x[..., :8].mul_(0.5)
        elif self.edit == "setitem":
            x = x.clone()
            x[..., :8] = 0.5 * x[..., 8:16]
        elif self.edit == "function":
            x = x.clone()
            F.relu_(x[..., :8])
        elif self.edit == "out":
            buffer = torch.zeros_like(x)
            buffer.copy_(x)
            x = buffer
        return x

    def forward(self, ids: Tensor) -> Tensor:
        if self.edit == "counter":
            self.calls.add_(1)
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = self.residual(block(x))
        logits = self.lm_head(self.ln_f(x))
        if self.edit == "logits":
            logits.div_(2.0)
        elif self.edit == "logits-view":
            logits[..., :5].sub_(3.0)
        return logits


@pytest.mark.parametrize("ratio", [RATIO, 1.0])
@pytest.mark.parametrize("edit", ["method", "view", "setitem", "function", "out", "counter", "logits", "logits-view"])
def test_operations_in_place(edit: str, ratio: float) -> None:
    """Nothing that mutates a tensor may be lost as dead code, nor move across what reads the tensor."""
    model, batch = Edited(edit), make_batch()
    args = batch["input_ids"], batch["labels"]

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(ids)
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))

    run = compiled(step, min_tokens_ratio=ratio, fallback="silent")
    for _ in range(2):
        got = backward(model, run(*args))
    assert int(model.calls) == (2 if edit == "counter" else 0)
    assert_selected_or_dense(got, model, batch, lambda: model(args[0]), lambda: step(*args))


def assert_selected_or_dense(
    got: Run, model: nn.Module, batch: Batch, logits: Callable[[], Tensor], loss: Callable[[], Tensor]
) -> None:
    """``got`` is what the metrics claim: the selected loss as we define it, or the user's own."""
    if metrics(model)["matched"]:
        assert_same(got, reference(model, logits, shift(batch["labels"]), selected(model)))
    else:
        assert_same(got, backward(model, loss()))


def test_figures_beside_the_loss() -> None:
    """Accuracy and perplexity computed from the same logits, without gradient, are the dense model's or say so."""
    model, batch = models.Decoder(), make_batch()
    args = batch["input_ids"], batch["labels"]

    def step(ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = model(ids)[:, :-1]
        loss = F.cross_entropy(logits.reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
        hits = (logits.argmax(-1) == labels[:, 1:]).float().mean()
        return loss, hits, loss.detach().exp()

    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    loss, hits, perplexity = run(*args)
    want = step(*args)
    assert hits == want[1]
    torch.testing.assert_close(perplexity, loss.detach().exp())
    got = backward(model, loss)
    assert_selected_or_dense(got, model, batch, lambda: model(args[0]), lambda: step(*args)[0])


def test_second_differentiable_output_keeps_its_gradient() -> None:
    """The step returns a loss and a penalty; the caller adds them after the compiled region."""
    model, batch = models.Decoder(), make_batch()
    args = batch["input_ids"], batch["labels"]

    def penalty() -> Tensor:
        return 0.1 * sum(block.up.weight.square().sum() for block in model.blocks)

    def step(ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(ids)
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)), penalty()

    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, sum(run(*args)))
    if metrics(model)["matched"]:
        with routing(model, hard_mask(selected(model), SEQ), "routed", "project"):
            loss = selected_loss(model(args[0]), shift(args[1]), selected(model))
            want = backward(model, loss + penalty())
    else:
        want = backward(model, sum(step(*args)))
    assert_same(got, want)


def test_model_called_twice_in_one_step() -> None:
    model, first, second = models.Decoder(), make_batch(seed=3), make_batch(seed=4)

    def one(ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(ids)[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))

    def step(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return one(a, b) + 0.5 * one(c, d)

    args = first["input_ids"], first["labels"], second["input_ids"], second["labels"]
    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, run(*args))
    assert metrics(model)["matched"] is False, "one selection cannot describe two losses"
    assert_same(got, backward(model, step(*args)))


@pytest.mark.parametrize("how", ["nll_loss", "gather"])
def test_cross_entropy_by_other_means(how: str) -> None:
    model, batch = models.Decoder(), make_batch()
    args = batch["input_ids"], batch["labels"]

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        log_p = F.log_softmax(model(ids)[:, :-1], dim=-1)
        if how == "nll_loss":
            return F.nll_loss(log_p.reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
        wanted = labels[:, 1:].clamp_min(0)
        return -(log_p.gather(-1, wanted[..., None])[..., 0] * (labels[:, 1:] != -100)).sum() / (labels != -100).sum()

    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, run(*args))
    assert_selected_or_dense(got, model, batch, lambda: model(args[0]), lambda: step(*args))


def test_shift_labels() -> None:
    """transformers' own argument for labels that are shifted already: those are the loss's targets."""
    model, batch = small(), make_batch()
    ahead = shift(batch["labels"]).roll(2, dims=1)  # plainly not a shift of labels
    compiled(model, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, model(**batch, shift_labels=ahead, use_cache=False).loss)
    if metrics(model)["matched"]:
        want = reference(model, lambda: eager_call(model, batch["input_ids"]).logits, ahead, selected(model))
    else:
        want = dense(model, {**batch, "shift_labels": ahead})
    assert_same(got, want)


def test_embeddings_as_input() -> None:
    model, batch = small(), make_batch()
    embeds = torch.randn(2, SEQ, models.HIDDEN, generator=torch.Generator().manual_seed(2))
    inputs = {"inputs_embeds": embeds, "labels": batch["labels"]}
    compiled(model, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, model(**inputs).loss)
    if metrics(model)["matched"]:
        assert_same(got, hf_reference(model, inputs, selected(model)))
    else:
        assert_same(got, dense(model, inputs))


def test_one_block_used_again_and_again() -> None:
    """ALBERT's way: the same weights in every layer."""
    model, batch = models.Decoder(), make_batch()
    for i in range(1, models.LAYERS):
        model.blocks[i] = model.blocks[0]
    args = batch["input_ids"], batch["labels"]

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(ids)[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))

    run = compiled(step, min_tokens_ratio=RATIO, fallback="silent")
    got = backward(model, run(*args))
    assert_selected_or_dense(got, model, batch, lambda: model(args[0]), lambda: step(*args))


@pytest.mark.parametrize("arguments", [{"fullgraph": True}, {"dynamic": True}, {"dynamic": False}], ids=str)
def test_arguments_of_torch_compile(arguments: dict[str, bool]) -> None:
    model = small()
    options = {"min_tokens_ratio": RATIO, "compiler": "eager", "fallback": "error"}
    model.compile(backend=backend(), options=options, **arguments)
    for size, seq in [(2, 16), (2, 20)]:
        check_against_reference(model, make_batch(size, seq))


@pytest.mark.parametrize("seq", [1, 2])
def test_very_short_sequences(seq: int) -> None:
    model, batch = small(), make_batch(2, seq, ignored=False)
    compiled(model, min_tokens_ratio=RATIO)
    got = backward(model, model(**batch).loss)
    if seq == 1:
        assert_zero(got)
    else:  # position 0 attends to itself alone: its query and key gradients are nothing but rounding
        assert_same(got, hf_reference(model, batch, selected(model)), tolerance=1e-4)
