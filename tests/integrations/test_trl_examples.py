"""The examples with TRL's trainers: two steps of each with a tiny model, selective and dense."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("trl")

import models
import trl_dpo
import trl_grpo
import trl_run
import trl_sft
from gsm8k_data import END, read_texts, train_tokenizer

EXAMPLES = {"sft": trl_sft, "dpo": trl_dpo, "grpo": trl_grpo}
OPTIONS = {"compiler": "eager", "launch_bound": "select", "fallback": "error"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of one layer with random weights, and a tokenizer made of a few problems."""
    path = tmp_path_factory.mktemp("model")
    texts = read_texts(trl_run.GSM8K / "train.jsonl")[:200]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(texts, 400), eos_token=END, pad_token=END)
    end = tokenizer.eos_token_id
    made = models.family(
        "llama",
        num_hidden_layers=1,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        eos_token_id=end,
        pad_token_id=end,
    )
    made.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def losses(text):
    return [float(number) for number in re.findall(r"'loss': '([^']+)'", text)]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_two_steps(name, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trl_grpo, "NEW_TOKENS", 8)
    arguments = [f"--model={folder}", "--steps=2", "--batch-size=2", "--shots=0", "--length=256", "--lr=0.01"]
    told = {}
    for kind in ("dense", "cggr"):
        torch.manual_seed(0)
        further = ["--dense"] if kind == "dense" else [f"--options={json.dumps(OPTIONS)}"]
        assert EXAMPLES[name].main([*arguments, *further, f"--out={tmp_path / kind}"]) == 0
        told[kind] = capsys.readouterr().out
    assert "Dense: 2 steps" in told["dense"] and "Selective: 2 steps" in told["cggr"]
    assert "selection=labels" in told["cggr"] and told["cggr"].count("'cggr/level': 'routed'") == 2
    first, second = (losses(told[kind])[0] for kind in ("dense", "cggr"))
    assert second == pytest.approx(first, rel=1e-3)
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "cggr" / "model").state_dict()
    changed = any(not torch.equal(value, after[key]) for key, value in before.items())
    assert after.keys() == before.keys() and changed == (name != "grpo")  # random completions earn no reward


def test_one_number_is_changed():
    answer = "He has 12 apples and buys 3.\n#### 15"
    seen = set()
    for seed in range(20):
        other = trl_dpo.with_another_number(answer, seed)
        assert re.sub(r"\d+", "N", other) == "He has N apples and buys N.\n#### N"
        numbers = list(zip(re.findall(r"\d+", answer), re.findall(r"\d+", other), strict=True))
        (place,) = (i for i, (old, new) in enumerate(numbers) if old != new)
        seen.add(place)
    assert seen == {0, 1, 2}


def test_reward():
    completions = [" 3 + 4\n#### 7", " #### 7.0\n\nQuestion: what else?\nAnswer: #### 8", " #### 8", " seven", ""]
    assert trl_grpo.right_number(completions, ["It is\n#### 7"] * 5) == [1, 1, 0, 0, 0]


def test_arguments(capsys):
    for given, said in (
        (["--steps=0"], "--steps must be at least 1"),
        (["--options=[]"], "--options must be a JSON object"),
        (['--options={"min_token_ratio": 1}'], "did you mean 'min_tokens_ratio'"),
    ):
        with pytest.raises(SystemExit):
            trl_sft.main(given)
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="multiple of"):
        trl_grpo.main([f"--batch-size={trl_grpo.GROUP + 1}"])
