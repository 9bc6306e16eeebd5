"""The benchmark of routers: its arms train what they say, from the same weights, on packed problems."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

import router_quality
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with a tokenizer of letters."""
    letters = {letter: i for i, letter in enumerate(["<end>", "?", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="?")
    found = tmp_path_factory.mktemp("model")
    fast.save_pretrained(found)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=28, num_key_value_heads=1, **sizes)).save_pretrained(found)
    return found


def test_wrong_arguments(capsys, tmp_path):
    for arguments, said in (
        (["--marks=5,5"], "--marks must be steps, at least 1, in ascending order"),
        (["--arms=truncated"], "not among dense"),
        (["--ratio=1"], r"--ratio must be in (0, 1)"),
        (["--batch=1"], "--batch must be at least 2"),
    ):
        with pytest.raises(SystemExit):
            router_quality.parse_arguments([f"--model={tmp_path}", *arguments])
        assert said in capsys.readouterr().err


def test_it_trains_and_says_what_is_known(folder, monkeypatch):
    few = router_quality.problems(router_quality.ROOT / "data" / "gsm8k" / "train.jsonl")[:40]
    monkeypatch.setattr(router_quality, "problems", lambda path: few)
    args = router_quality.parse_arguments(["--tiny", f"--model={folder}", "--marks=2,12", "--lr=0.01"])
    turns = []
    learned = router_quality.run("learned", args, lambda: turns.append(1))
    first, last = learned["marks"]
    assert turns == [1] and (first["step"], last["step"], last["level"]) == (2, 12, "routed")
    assert all(-1 <= each["score_correlation"] <= 1 and 0 < each["concentration"] <= 1 for each in (first, last))
    assert max(learned["loss"], last["train_loss"]) < 3.0 < first["train_loss"]


def test_the_table():
    mark = {"step": 2, "step_ms": 10.0, "train_loss": 1.0, "score_correlation": 0.51, "concentration": 0.7}
    results = [
        {"arm": "learned", "marks": [{**mark, "level": "routed"}], "loss": 1.25},
        {"arm": "half", "marks": [{**dict.fromkeys(mark), "step_ms": 9.0, "level": None}], "loss": 1.5},
        {"arm": "spans", "error": "no memory"},
    ]
    console = Console(width=130, record=True)
    console.print(router_quality.table({"machine": {"device": "a card"}, "results": results}, [2]))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["│", "learned", "│", "0.510", "│", "0.700", "│", "1.2500", "│", "10.0", "│", "routed", "│"] in lines
    assert ["│", "half", "│", "–", "│", "–", "│", "1.5000", "│", "9.0", "│", "–", "│"] in lines


@pytest.mark.slow
def test_the_command(folder, tmp_path):
    path = tmp_path / "router.json"
    assert router_quality.main(["--tiny", f"--model={folder}", f"--json={path}"]) == 0
    half, *others = json.loads(path.read_text())["results"]
    assert half["sequences"] == 1 and half["marks"][0]["concentration"] is None
    assert [(record["arm"], record["marks"][1]["level"]) for record in others] == [
        ("learned", "routed"),
        ("spans", "routed"),
    ]
