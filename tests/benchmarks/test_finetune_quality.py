"""The quality benchmark of fine-tuning: which runs it makes, that it goes on, and a whole study with a small model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import finetune_quality
import finetune_quality_worker as worker
from finetune_quality import Study, parse_arguments
from finetune_quality_report import table
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STEP_S = {"dense": 0.04, "dense:4": 0.02, "context-8": 0.01}


class Process:
    """A worker that learns nothing: its loss falls with the steps, and is best at 2e-4."""

    def __init__(self, arm: str, settings: dict[str, Any], log: Any, card: str) -> None:
        self.arm, self.log, self.batch, self.best, self.seconds = arm, log, 8, 0.0, 0.0
        self.asked: list[dict[str, Any]] = []

    def answer(self) -> dict[str, Any]:
        return {"compile_s": 1.0}

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        self.asked.append({"do": do, **request})
        if do == "time":
            return {"seconds": STEP_S[self.arm]}
        if do == "accuracy":
            return {"accuracy": 0.5, "count": request["count"]}
        return {"loss": 1.0 / request["steps"] + abs(request["lr"] - 2e-4), "metrics": None}

    def end(self) -> None:
        pass


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Makes studies without models; ``study.asked`` is what their workers were asked, by arm."""
    made: list[Process] = []

    def process(*arguments: Any) -> Process:
        made.append(Process(*arguments))
        return made[-1]

    monkeypatch.setattr(finetune_quality, "Process", process)
    monkeypatch.setattr(finetune_quality.Process, "answer", Process.answer, raising=False)
    monkeypatch.setattr(finetune_quality, "prepare", lambda args: {"labelled": 0.05})

    def run(*arguments: str) -> Study:
        made.clear()
        args = parse_arguments([f"--out={tmp_path}", f"--arms={','.join(STEP_S)}", "--seeds=2", *arguments])
        found = Study(args, lambda line: None)
        found.run()
        found.asked = {p.arm: [r for r in p.asked if r["do"] == "train"] for p in made}  # type: ignore[attr-defined]
        return found

    return run


def test_the_runs(study):
    """Every rate once; then the best one with the other seeds, and for the time that the first arm took."""
    found = study("--steps=100")
    runs = [(r["lr"], r["seed"], r["steps"]) for r in found.asked["context-8"]]
    rates = [(lr, 0, 100) for lr in (1e-4, 2e-4, 4e-4)]
    assert runs == [*rates, (2e-4, 0, 400), (2e-4, 1, 100), (2e-4, 1, 400)]
    assert [(r["seed"], r["steps"]) for r in found.asked["dense"]] == [(0, 100)] * 3 + [(1, 100)]
    assert found.document["arms"]["dense:4"]["lr"] == 2e-4
    console = Console(width=200, record=True)
    console.print(table(found.document))
    text = console.export_text()
    assert "4.00" in text and "0.0100 ± 0.0000 (2)" in text and "0.0025 ± 0.0000 (2)" in text


def test_it_goes_on_where_it_stopped(study):
    first = study("--steps=100", "--time-limit=0")
    assert not any(first.asked.values()) and not first.document["runs"]
    whole = study("--steps=100")
    again = study("--steps=100")
    assert not any(again.asked.values()), "what is in the file is not run again"
    assert again.document["runs"] == whole.document["runs"]
    answered = study("--steps=100", "--accuracy=10")
    assert [(r["seed"], r["steps"]) for r in answered.asked["context-8"]] == [(0, 100), (0, 400)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arms=dense,sparse"], "'sparse' is none of dense, exact, random, context-N"),
        (["--arms=dense,dense"], "names one twice"),
        (["--equal-time=dense"], "not among --arms, or the first of them"),
        (["--steps=0"], "--steps must be at least 1"),
        (["--lora=0"], "--lora must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert said in capsys.readouterr().err


def test_options_of_arms():
    assert worker.options_of("context-64", "") == {"context": 64}
    assert worker.options_of("context-64-stop", "") == {"context": 64, "kv_gradient": "stop"}
    assert worker.options_of("exact", "") == {"gradient": "exact"}
    assert worker.options_of("random", "0.02")["min_tokens_ratio"] == 0.02


def test_the_learning_rate():
    rates = [worker.learning_rate(1.0, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) < 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] == pytest.approx(0.05, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--lora=4"]], ids=["model", "adapters"])
def test_a_whole_study(tmp_path, more):
    """With real workers; a tokenizer of words, so that a sequence has few tokens with a label."""
    words = {word: i for i, word in enumerate(["<pad>", "<end>", "?", "Question", "Answer", "the", "of", "####"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="?")
    folder = tmp_path / "model"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=1, **sizes)).save_pretrained(folder)
    out = tmp_path / "out"
    code = finetune_quality.main(["--tiny", f"--model={folder}", f"--out={out}", "--shots=2", "--length=160", *more])
    assert code == 0, [log.read_text()[-2000:] for log in out.glob("*.log")]
    document = json.loads((out / "finetune_quality.json").read_text())
    assert {run["arm"] for run in document["runs"]} == {"dense", "context-8"}
    metrics = next(run["metrics"] for run in document["runs"] if run["arm"] == "context-8")
    assert metrics["matched"] and metrics["selection"] == "labels"
    losses = [run["loss"] for run in document["runs"] if run["steps"] == 2]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
