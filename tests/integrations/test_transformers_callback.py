"""transformers' Trainer with ``CGGRCallback``: what it trains, counts, logs, saves, and where it says no."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import models
import pytest
import torch
from trainers import OPTIONS, Collator, Tokens, llama, plain, same, weights
from training import complaints

import cggr_compile
from cggr_compile import compat
from cggr_compile.runtime import FallbackWarning

transformers = pytest.importorskip("transformers")
from transformers import Trainer, TrainingArguments  # noqa: E402

from cggr_compile.integrations.transformers import CGGRCallback  # noqa: E402

LR = 0.05


@pytest.fixture
def trainer_of(tmp_path):
    """A trainer of a model, and its callback."""

    def make(model, *, data=None, options=None, collator=None, **arguments):
        settings = dict(
            per_device_train_batch_size=2,
            max_steps=2,
            logging_steps=1,
            learning_rate=LR,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        extra = {name: arguments.pop(name) for name in ("model_init", "compute_loss_func") if name in arguments}
        args = TrainingArguments(str(tmp_path / "run"), **{**settings, **arguments})
        callback = CGGRCallback(**(OPTIONS if options is None else options))
        trainer = Trainer(
            model, args, collator or Collator(), data or Tokens(), eval_dataset=Tokens(4), callbacks=[callback], **extra
        )
        return trainer, callback

    return make


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def runtime_of(callback):
    return callback._training.runtime


def test_trains_like_a_loop_by_hand(trainer_of):
    """Two micro-batches a step, of one sum divided by the labels of both; evaluation runs as it is."""
    collator, steps = Collator(), 3
    trainer, callback = trainer_of(llama(), collator=collator, max_steps=steps, gradient_accumulation_steps=2)
    trainer.train()
    batches = collator.batches[: 2 * steps]
    assert "eval_loss" in trainer.evaluate()
    runtime = runtime_of(callback)
    assert runtime is cggr_compile.runtime(trainer.model) and all(report.training for report in runtime.reports)

    model = llama()
    model.compile(backend="cggr", options={**OPTIONS, "advance": "manual"})
    optimizer, by_hand = torch.optim.SGD(model.parameters(), lr=LR), cggr_compile.runtime(model)
    losses = []
    for first in range(0, 2 * steps, 2):
        pair = batches[first : first + 2]
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in pair)
        found = [model(**batch, num_items_in_batch=count).loss for batch in pair]
        losses.append(sum(found).item())
        sum(found).backward()
        optimizer.step()
        optimizer.zero_grad()
        by_hand.step()
    assert logged(trainer, "loss") == pytest.approx(losses, abs=1e-4)
    assert same(weights(trainer.model), weights(model))
    assert not same(weights(model), weights(llama()))
    values = runtime.metrics()
    assert values["step"] == steps and values == by_hand.metrics()
    assert logged(trainer, "cggr/level") == ["routed"] * steps and logged(trainer, "cggr/ratio") == [0.25] * steps
    assert logged(trainer, "cggr/token_ratio")[-1] == values["token_ratio"]


@pytest.mark.parametrize("anew", models.slow_but([False], [False, True]))
def test_resumes_from_a_checkpoint(trainer_of, anew):
    """The positions, and the ratio of a warm-up, go on as they were; also where the trainer makes callbacks anew."""
    options = {**OPTIONS, "warmup_steps": 3, "ladder": [1.0, 0.5], "seed": 7}
    arguments = dict(max_steps=4, save_strategy="steps", save_steps=2, restore_callback_states_from_checkpoint=anew)
    trainer, callback = trainer_of(plain(), options=options, **arguments)
    trainer.train()
    expected, path = weights(trainer.model), Path(trainer.args.output_dir) / "checkpoint-2"
    saved = json.loads((path / "trainer_state.json").read_text())["stateful_callbacks"]["CGGRCallback"]["attributes"]
    assert saved["runtime_state"]["step"] == 2 and saved["runtime_state"]["seed"] == 7

    resumed, other = trainer_of(plain(), options=options, **arguments)
    resumed.train(resume_from_checkpoint=str(path))
    used = next(c for c in resumed.callback_handler.callbacks if isinstance(c, CGGRCallback))
    assert (used is other) is not anew
    assert runtime_of(used).metrics()["step"] == 4 == runtime_of(callback).metrics()["step"]
    assert torch.equal(runtime_of(used).selected, runtime_of(callback).selected)
    assert logged(resumed, "cggr/ratio") == logged(trainer, "cggr/ratio")
    assert same(weights(resumed.model), expected)


@pytest.mark.slow
def test_resumes_where_the_callback_is_new(trainer_of):
    arguments = dict(max_steps=2, save_strategy="steps", save_steps=1)
    trainer, _ = trainer_of(plain(), **arguments)
    trainer.remove_callback(CGGRCallback)
    trainer.train()
    resumed, callback = trainer_of(plain(), **arguments)
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-1"))
    assert runtime_of(callback).metrics()["step"] == 1


def test_a_checkpoint_cannot_hold_a_function(trainer_of):
    def formula(entropy):
        return entropy

    _, callback = trainer_of(plain(), options={**OPTIONS, "scoring": formula})
    state = callback.state()
    json.dumps(state)
    restored = type(callback)(**state["args"])
    for name, value in state["attributes"].items():
        setattr(restored, name, value)
    trainer, _ = trainer_of(plain())
    trainer.callback_handler.callbacks[-1] = restored
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint"):
        trainer.train()


def test_label_smoothing(trainer_of):
    """Smoothed by the model's loss; with every label selected loss and gradient are those of the stock trainer."""
    arguments = dict(label_smoothing_factor=0.3, max_steps=2, learning_rate=0.01)
    options = {**OPTIONS, "selection": "labels", "max_selected": 1.0, "gradient": "exact"}
    trainer, _ = trainer_of(llama(), options=options, **arguments)
    smoother, loss = trainer.label_smoother, trainer.model.loss_function
    trainer.train()
    assert logged(trainer, "cggr/level") == ["routed", "routed"]
    assert trainer.label_smoother is smoother is not None and trainer.model.loss_function is loss
    stock, _ = trainer_of(llama(), **arguments)
    stock.remove_callback(CGGRCallback)
    stock.train()
    assert logged(trainer, "loss") == pytest.approx(logged(stock, "loss"), rel=1e-5)
    assert logged(trainer, "grad_norm") == pytest.approx(logged(stock, "grad_norm"), rel=1e-4)
    assert same(weights(trainer.model), weights(stock.model), atol=1e-5)


def test_label_smoothing_of_another_loss(trainer_of):
    model = llama()
    model.loss_function = transformers.loss.loss_utils.ForSequenceClassificationLoss
    trainer, _ = trainer_of(model, label_smoothing_factor=0.1, max_steps=1, options={**OPTIONS, "fallback": "warn"})
    with pytest.warns(FallbackWarning, match=r"label_smoothing_factor: LlamaForCausalLM has no loss_function"):
        trainer.train()
    assert logged(trainer, "cggr/level") == ["dense"] and not compat.is_compiled(model)


@pytest.mark.slow
def test_neftune_with_many_sizes(trainer_of):
    """Its noise reads the size of the batch, which a graph with symbolic sizes cannot do."""
    arguments = dict(neftune_noise_alpha=5.0, max_steps=4, train_sampling_strategy="sequential")
    trainer, _ = trainer_of(llama(), data=Tokens(8, (16, 24, 32, 20)), **arguments)
    trainer.train()
    assert logged(trainer, "cggr/level") == ["routed"] * 4


def test_adapters_with_checkpointing(trainer_of):
    """The hook that breaks the graph is taken off, and comes back whenever checkpointing is switched on."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    before = {name: p for name, p in weights(model).items() if "lora_A" in name}
    trainer, _ = trainer_of(model, gradient_checkpointing=True, max_steps=3, learning_rate=1.0)

    class SwitchOn(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.gradient_checkpointing_disable()
            model.gradient_checkpointing_enable()

    trainer.add_callback(SwitchOn())
    with complaints() as said:
        trainer.train()
    assert logged(trainer, "cggr/level") == ["routed"] * 3
    assert sum("enable_input_require_grads() is taken off" in text for text in said) == 1
    after = weights(model)
    assert all(not torch.equal(p, after[name]) for name, p in before.items())


@pytest.mark.slow
def test_reentrant_checkpoints_keep_the_hook(trainer_of):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer, _ = trainer_of(model, max_steps=1, options={**OPTIONS, "fallback": "warn"}, **kwargs)
    with pytest.warns(FallbackWarning, match=r"use_reentrant=False"):
        trainer.train()
    assert logged(trainer, "cggr/level") == ["loss"]


@pytest.mark.slow
def test_a_model_made_by_the_trainer(trainer_of):
    trainer, callback = trainer_of(None, model_init=plain, max_steps=1)
    trainer.train()
    assert runtime_of(callback) is cggr_compile.runtime(trainer.model) and logged(trainer, "cggr/level") == ["routed"]


@pytest.mark.slow
def test_mixed_precision(trainer_of):
    trainer, _ = trainer_of(llama(), bf16=True, max_steps=1)
    trainer.train()
    assert logged(trainer, "cggr/level") == ["routed"]


def unfit(kind):
    """A model that cannot be trained selectively, arguments of its trainer, and what is said of it."""
    model, arguments, why = plain(), {}, "compiled already"
    if kind == "in place":
        model.compile(backend="eager")
    elif kind == "a part":
        model.blocks[0].compile(backend="eager")
    elif kind == "torch_compile":
        arguments = {"torch_compile": True, "torch_compile_backend": "eager"}
    else:
        arguments["compute_loss_func"] = lambda outputs, labels, num_items_in_batch=None: outputs[1].square().mean()
        why = "compute_loss_func takes the labels away"
    return model, arguments, why


@pytest.mark.parametrize(
    "kind",
    models.slow_but(["a part", "compute_loss_func"], ["in place", "a part", "torch_compile", "compute_loss_func"]),
)
def test_what_cannot_be_rewritten(trainer_of, kind):
    """One message, and training goes on as it is; or an error, if that is asked for."""
    model, arguments, why = unfit(kind)
    trainer, callback = trainer_of(model, options={**OPTIONS, "fallback": "warn"}, **arguments)
    before = weights(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]
    assert len(told) == 1 and why in told[0], told
    assert runtime_of(callback) is None and logged(trainer, "cggr/level") == ["dense", "dense"]
    assert "cggr/ratio" not in trainer.state.log_history[0] and not same(weights(model), before)
    model, arguments, why = unfit(kind)
    trainer, _ = trainer_of(model, **arguments)
    with pytest.raises(ValueError, match=f"(?s)fallback='error'.*{why}"):
        trainer.train()


def test_data_parallel(trainer_of):
    trainer, callback = trainer_of(plain(), options={"fallback": "silent"})
    trainer.model_wrapped = torch.nn.DataParallel(trainer.model)
    callback._attach(trainer, trainer.args)
    assert runtime_of(callback) is None and not compat.is_compiled(trainer.model)


def test_a_loss_that_is_a_flag(trainer_of):
    """TRL's trainers, beside transformers before 5.19: nothing that could be called."""
    trainer, callback = trainer_of(plain())
    trainer.compute_loss_func = "any value but None"
    callback._attach(trainer, trainer.args)
    assert runtime_of(callback) is not None and compat.is_compiled(trainer.model)


def test_options():
    with pytest.raises(ValueError, match="did you mean 'min_tokens_ratio'"):
        CGGRCallback(min_token_ratio=0.5)
    with pytest.raises(ValueError, match="min_tokens_ratio must be in"):
        CGGRCallback(min_tokens_ratio=2.0)
    with pytest.raises(ValueError, match="advance must be left out"):
        CGGRCallback(advance="auto")


def test_outside_of_a_trainer():
    state = transformers.TrainerState()
    with pytest.raises(ValueError, match=r"must be given to a transformers\.Trainer"):
        CGGRCallback().on_train_begin(None, state, None)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """One graph in spite of many buckets; every process selects positions of its own; the weights stay the same."""
    tests = Path(models.__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(tests / "data_parallel_run.py"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=280, env={**os.environ, "PYTHONPATH": paths})
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for found in (first, second):
        assert found["wrapped"] == "DistributedDataParallel"
        assert found["metrics"]["matched"] and found["metrics"]["step"] == 2, found["metrics"]
    assert first["selected"] != second["selected"] and second["seed"] == first["seed"]
    assert first["weight"] == second["weight"]
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert state["CGGRCallback"]["attributes"]["runtime_state"]["seed"] == first["seed"]
