"""TRL's trainers with ``CGGRCallback``: its fused head is ours, in one graph, and the gradient that of the rows."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from types import SimpleNamespace

import models
import pytest
import torch

import cggr_compile

pytest.importorskip("trl")

from accelerate import Accelerator
from datasets import Dataset
from reference import Picks, Run, assert_same, context_rows, hard_mask, overall, routing
from transformers import LlamaForSequenceClassification, TrainerCallback
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.utils import add_fused_lm_head
from trl_setup import chats, completions, model, preferences, texts, tokenizer, words

from cggr_compile.integrations.fused_head import find_fused_head, replace_fused_head
from cggr_compile.integrations.top_entropy import kept_by_entropy
from cggr_compile.integrations.transformers import CGGRCallback
from cggr_compile.runtime import FallbackWarning

# every label carries its exact gradient: nothing differs from stock TRL
EVERYTHING = {
    "compiler": "eager",
    "fallback": "silent",
    "launch_bound": "select",
    "selection": "labels",
    "max_selected": 1.0,
    "gradient": "exact",
}
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def results(forward, batch, parameters, **arguments):
    """All fields of an output, and the gradient of a formula of those that have one."""
    out = forward(**batch, fused_lm_head=True, **arguments)
    loss = (out.log_probs * out.log_probs.detach().exp()).sum() + 0.3 * out.entropy.square().sum() + out.loss
    return dict(out), torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("labels", ["some", "none", "shifted", "counted"])
def test_the_forward_is_trls(family, labels):
    """Soft-cap, scales, temperature; ignored labels, all of them ignored, labels that are shifted, a count."""
    made = models.family(family, num_hidden_layers=1)
    add_fused_lm_head(made, temperature=0.7, outputs=OUTPUTS)
    stock = made.forward
    replace_fused_head(made, find_fused_head(made), Accelerator(cpu=True))
    batch = models.make_batch()
    if labels == "none":
        batch["labels"] = torch.full_like(batch["labels"], -100)
    extra = {"num_items_in_batch": torch.tensor(50)} if labels == "counted" else {}
    if labels == "shifted":
        batch["shift_labels"] = batch.pop("labels").roll(-1)
    parameters = list(made.parameters())
    want, want_gradients = results(stock, batch, parameters, **extra)
    got, got_gradients = results(made.forward, batch, parameters, **extra)
    assert got.keys() == want.keys() and len(got) == 7
    for name, value in want.items():
        assert got[name].dtype == value.dtype and got[name].requires_grad == value.requires_grad, name
        torch.testing.assert_close(got[name], value, atol=2e-5, rtol=1e-5)
    for got_gradient, want_gradient in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(got_gradient, want_gradient, atol=1e-4, rtol=1e-4)


def test_other_calls_are_left_to_trl():
    made = models.family("llama", num_hidden_layers=1)
    batch = models.make_batch()
    want = made(**batch)
    add_fused_lm_head(made, outputs=("entropy",), cast_lm_head_to_fp32=True)
    head = find_fused_head(made)
    replace_fused_head(made, head, Accelerator(cpu=True))
    assert head.outputs == ("entropy",) and head.cast_lm_head_to_fp32
    torch.testing.assert_close(made(**batch).loss, want.loss)
    called = []
    object.__setattr__(head, "forward", lambda **arguments: called.append(arguments))
    made(**batch, fused_lm_head=True)
    assert not called
    with torch.no_grad():
        made(**batch, fused_lm_head=True)
    made.eval()(**batch, fused_lm_head=True)
    made.train()(**batch, fused_lm_head=True, output_router_logits=True)
    assert len(called) == 3 and all(arguments["fused_lm_head"] for arguments in called)


def test_another_trl(monkeypatch):
    def _fused_forward(self, *args, **kwargs):
        return None

    made = models.family("llama", num_hidden_layers=1)
    assert find_fused_head(made) is None
    made.forward = _fused_forward.__get__(made)
    with pytest.raises(KeyError):
        find_fused_head(made)


def reward(completions, **kwargs):
    return [float(len(set(text.split())) % 5) for text in completions]


def labelled():
    rows = [{"prompt": words(10, i), "completion": " " + words(4, 100 + i), "label": bool(i % 2)} for i in range(8)]
    return Dataset.from_list(rows)


def prompts():
    return Dataset.from_list([{"prompt": words(10, i)} for i in range(8)])


def sft(data, **arguments):
    return lambda base, **rest: SFTTrainer(model(), SFTConfig(**base, **arguments), train_dataset=data(), **rest)


def reinforce(trainer, config, **arguments):
    arguments = {"max_completion_length": 6, "num_generations": 2, **arguments}
    return lambda base, **rest: trainer(model(), reward, config(**base, **arguments), train_dataset=prompts(), **rest)


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)


TRAINERS = {
    "sft": sft(texts, max_length=16),
    "sft, completions": sft(completions, max_length=16),
    "sft, assistant": sft(chats, max_length=16, assistant_only_loss=True),
    "sft, packing": sft(texts, max_length=32, packing=True),
    "sft, padding-free": sft(texts, max_length=None, padding_free=True),
    "sft, dft": sft(completions, max_length=16, loss_type="dft"),
    "sft, bfloat16": sft(completions, max_length=16, bf16=True),
    "dpo": lambda base, **rest: DPOTrainer(
        model(), model(), DPOConfig(**base, max_length=16), train_dataset=preferences(), **rest
    ),
    "kto": lambda base, **rest: KTOTrainer(
        model(), model(), KTOConfig(**base, max_length=16), train_dataset=labelled(), **rest
    ),
    "grpo": reinforce(GRPOTrainer, GRPOConfig, top_entropy_quantile=0.5),
    "rloo": reinforce(RLOOTrainer, RLOOConfig, beta=0.0),
    "sft, lora": lambda base, **rest: sft(completions, max_length=16)(base, peft_config=lora(), **rest),
    "grpo, lora": lambda base, **rest: reinforce(GRPOTrainer, GRPOConfig)(base, peft_config=lora(), **rest),
}
BASE = {"per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "learning_rate": 0.05, "optim": "sgd"}
BASE |= {"lr_scheduler_type": "constant", "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}


@pytest.mark.parametrize("kind", models.slow_but(["sft, completions"], TRAINERS))
def test_equals_stock(kind, tmp_path):
    """Loss, gradient norm and metrics of every step, with gradient checkpointing, which is TRL's default."""
    logs = {}
    for callbacks in ([], [CGGRCallback(**EVERYTHING)]):
        torch.manual_seed(0)
        base = {"bf16": False, **BASE, "output_dir": str(tmp_path)}
        if "bfloat16" in kind:
            del base["bf16"]
        trainer = TRAINERS[kind](base, processing_class=tokenizer(), callbacks=callbacks)
        trainer.train()
        logs[bool(callbacks)] = trainer.state.log_history[:2]
    runtime = cggr_compile.runtime(trainer.model)
    sizes = 2 if kind.startswith(("grpo", "rloo")) else 1  # of completions, at most
    assert 1 <= len(runtime.reports) <= sizes and all(report.training for report in runtime.reports)
    figures = runtime.metrics()
    assert figures["level"] == "routed" and figures["token_ratio"] == 1 and figures["labels_overflow"] == 0, figures
    close = {"rel": 2e-2, "abs": 2e-3} if "bfloat16" in kind else {"rel": 1e-4, "abs": 1e-5}
    for stock, ours in zip(logs[False], logs[True], strict=True):
        compared = [name for name in stock if not any(word in name for word in ("time", "runtime", "second"))]
        assert {"loss", "grad_norm", "entropy"} <= set(compared)
        assert {name: ours[name] for name in compared} == pytest.approx({n: stock[n] for n in compared}, **close)


def test_left_padding_between_generations(tmp_path, monkeypatch):
    """One graph for batches with and without padding in front, though every generation switches checkpointing."""
    rows = [{"prompt": words(6 if i == 0 else 10, i)} for i in range(8)]
    monkeypatch.setattr(sys.modules[__name__], "prompts", lambda: Dataset.from_list(rows))
    make = reinforce(GRPOTrainer, GRPOConfig, generation_kwargs={"min_new_tokens": 6}, gradient_accumulation_steps=2)
    base = {"bf16": False, **BASE, "seed": 7, "max_steps": 3, "output_dir": str(tmp_path)}
    logs, padded = {}, []
    for callbacks in ([], [CGGRCallback(**EVERYTHING)]):
        torch.manual_seed(0)
        trainer = make(base, processing_class=tokenizer(), callbacks=callbacks)
        compute = trainer._compute_loss

        def watched(model, inputs, compute=compute):
            padded.append(not inputs["prompt_mask"].all())
            return compute(model, inputs)

        trainer._compute_loss = watched
        trainer.train()
        logs[bool(callbacks)] = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history[:3]]
    assert padded[:2] == [False, True]
    for ours, stock in zip(logs[True], logs[False], strict=True):
        assert ours == pytest.approx(stock, rel=1e-4, abs=1e-5)
    runtime = cggr_compile.runtime(trainer.model)
    assert len(runtime.reports) == 1 and runtime.metrics()["level"] == "routed"


def test_rows_of_the_tokens_that_grpo_keeps(tmp_path):
    """Half of the tokens by entropy, a slot for one of each completion: what TRL keeps beyond is counted."""
    torch.manual_seed(0)
    base = {"bf16": False, **BASE, "max_steps": 1, "output_dir": str(tmp_path)}
    arguments = {"top_entropy_quantile": 0.5, "generation_kwargs": {"min_new_tokens": 6}}
    callback = CGGRCallback(**EVERYTHING | {"max_selected": 1})
    make = reinforce(GRPOTrainer, GRPOConfig, **arguments)
    trainer = make(base, processing_class=tokenizer(), callbacks=[callback])
    trainer.train()
    figures, logs = cggr_compile.runtime(trainer.model).metrics(), trainer.state.log_history[0]
    assert figures["level"] == "routed" and figures["tokens_selected"] == 2
    # two completions of six tokens; of the candidates one or two are below the quantile
    assert 6 <= figures["tokens_total"] <= 8 and figures["labels_overflow"] == figures["tokens_total"] - 2
    assert logs["cggr/top_entropy_overflow"] == 6 - 2


def test_when_grpo_keeps_tokens_by_entropy_alone():
    def options(kind=GRPOTrainer, processes=1, **given):
        trainer = object.__new__(kind)
        settings = {"top_entropy_quantile": 0.2, "beta": 0.0, "importance_sampling_level": "token", "tools": []}
        trainer.__dict__ |= settings | {"accelerator": SimpleNamespace(num_processes=processes)} | given
        return kept_by_entropy(trainer)

    class OwnLoss(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    assert options() == {"top_entropy_quantile": 0.2, "context": 0}
    assert options(processes=2)["top_entropy_quantile"] == pytest.approx(0.25)
    assert options(processes=2, top_entropy_quantile=0.9)["top_entropy_quantile"] == 1.0
    others = [{"top_entropy_quantile": 1.0}, {"beta": 0.1}, {"importance_sampling_level": "sequence"}, {"tools": [len]}]
    assert all(options(**other) is None for other in others)
    assert options(kind=OwnLoss) is options(kind=RLOOTrainer) is None


@pytest.mark.slow
def test_distillation_stays_as_it_is(tmp_path):
    def trained(*callbacks):
        torch.manual_seed(0)
        config = DistillationConfig(**BASE, bf16=False, max_completion_length=4, output_dir=str(tmp_path))
        student, teacher = model(), models.randomise(model(), seed=2)
        made = DistillationTrainer(
            student, teacher, config, train_dataset=prompts(), processing_class=tokenizer(), callbacks=[*callbacks]
        )
        made.train()
        return made.state.log_history[:2]

    callback = CGGRCallback(**{**EVERYTHING, "fallback": "warn"})
    with pytest.warns(FallbackWarning, match="DistillationTrainer computes the loss in place of the model's forward"):
        ours = trained(callback)
    stock = trained()
    assert stock[0]["loss"] > 0 and [entry["cggr/level"] for entry in ours] == ["dense"] * 2
    assert [entry["loss"] for entry in ours] == [entry["loss"] for entry in stock]


def reward_model(base, **rest):
    config = model().config
    config.num_labels, config.pad_token_id = 1, tokenizer().pad_token_id
    made = models.randomise(LlamaForSequenceClassification(config))
    return RewardTrainer(made, RewardConfig(**base, max_length=16), train_dataset=preferences(), **rest)


def experimental(name, data, **arguments):
    def make(base, **rest):
        module = importlib.import_module(f"trl.experimental.{name}")
        kind, config = (getattr(module, f"{name.upper()}{what}") for what in ("Trainer", "Config"))
        teacher = [models.randomise(model(), seed=2)] if name == "gkd" else []
        return kind(model(), *teacher, args=config(**base, **arguments), train_dataset=data(), **rest)

    return make


OUTSIDE = "the compiled function returns linear .*, and the loss is computed outside of it"
DENSE = {
    "orpo": (experimental("orpo", preferences, max_length=16), OUTSIDE),
    "cpo": (experimental("cpo", preferences, max_length=16), OUTSIDE),
    "gkd": (experimental("gkd", chats, max_length=24, max_new_tokens=4), OUTSIDE),
    "reward": (reward_model, "LlamaForSequenceClassification computes values of whole sequences"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DENSE)
def test_dense_with_the_reason(kind, tmp_path):
    make, reason = DENSE[kind]
    base, logs = {**BASE, "max_steps": 1, "bf16": False, "output_dir": str(tmp_path)}, []
    callback = CGGRCallback(**{**EVERYTHING, "fallback": "warn"})
    for callbacks in ([], [callback]):
        torch.manual_seed(0)
        trainer = make(base, processing_class=tokenizer(), callbacks=callbacks)
        with pytest.warns(FallbackWarning, match=reason) if callbacks else contextlib.nullcontext():
            trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[1]["cggr/level"] == "dense" and logs[0]["loss"] > 0
    for name in ("loss", "grad_norm"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-5)


class FirstGradient(TrainerCallback):
    """Keeps the loss's gradient of the first step, before it is clipped."""

    def __init__(self):
        self.run = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        self.run = Run(torch.zeros(()), grads)


@contextlib.contextmanager
def on_rows(trainer, picks, context):
    """A stock trainer's first step with the gradient of some rows, by hooks in its model and in its fused head.

    ``context``: positions before each selected one that carry gradient too.
    """
    forward, rows = trainer.model.forward, picks.rows

    with contextlib.ExitStack() as stack:

        @functools.wraps(forward)
        def on_rows(*args, **kwargs):
            if not (kwargs.get("fused_lm_head") and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
            size = kwargs["input_ids"].shape[1]
            hard = hard_mask(rows, size) | context_rows(rows, context, slots=size, size=size)
            stack.enter_context(routing(trainer.model, hard, "routed", "project"))
            out = forward(*args, **kwargs)
            factors = torch.zeros(len(rows), size + 1)
            factors.scatter_(1, torch.where(rows < 0, size, rows), picks.weights)
            for name in ("log_probs", "entropy"):  # [B, S - 1]
                out[name] = out[name].detach() + (out[name] - out[name].detach()) * factors[:, : size - 1]
            return out

        trainer.model.forward = on_rows
        yield


# trainers, the selection that the first batch makes of the defaults, and options
SELECTED = {
    "sft, completions": ("labels", {"context": 3}),
    "sft": ("importance", {}),
    "sft, dft": ("labels", {"context": 3}),
    "dpo": ("labels", {"context": 3}),
    "kto": ("labels", {"context": 3}),
    "grpo": ("labels", {"context": 3}),
    "rloo": ("importance", {"selection": "importance"}),
}


@pytest.mark.parametrize("kind", models.slow_but(["sft, completions", "sft"], SELECTED))
def test_gradient_of_the_selected_rows(kind, tmp_path, monkeypatch):
    """One step of the defaults: loss and metrics of stock TRL, and the gradient of stock TRL on the same rows."""
    monkeypatch.setattr(sys.modules[__name__], "model", functools.partial(model, num_hidden_layers=2))
    selection, options = SELECTED[kind]
    base = {"bf16": False, **BASE, "max_steps": 1, "output_dir": str(tmp_path)}

    def trained(*callbacks, context=lambda trainer: contextlib.nullcontext()):
        torch.manual_seed(0)
        first = FirstGradient()
        trainer = TRAINERS[kind](base, processing_class=tokenizer(), callbacks=[*callbacks, first])
        with context(trainer):
            trainer.train()
        return trainer, first.run

    trainer, got = trained(CGGRCallback(compiler="eager", fallback="error", launch_bound="select", **options))
    runtime = cggr_compile.runtime(trainer.model)
    figures, rows = runtime.metrics(), runtime.selected
    assert figures["level"] == "routed" and figures["selection"] == selection, figures
    assert not figures["labels_overflow"] and not figures["context_overflow"], figures
    assert (figures["tokens_selected"] == figures["tokens_total"]) == (selection == "labels"), figures
    picks = Picks(rows, runtime.weights)
    stock, want = trained(context=lambda trainer: on_rows(trainer, picks, options.get("context", 0)))
    ours, theirs = trainer.state.log_history[0], stock.state.log_history[0]
    # at the first step of DPO both rewards are zero, which is larger is rounding
    compared = [name for name in theirs if not any(word in name for word in ("time", "second", "accuracies"))]
    assert {n: ours[n] for n in compared} == pytest.approx({n: theirs[n] for n in compared}, rel=1e-4, abs=1e-5)
    assert_same(got, want, 1e-4)
    _, dense = trained()
    assert overall(got, dense) > 1e-2
