"""The benchmark of GRPO's rewards: what a completion is worth, what the table says, and a tiny run."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("trl")

import grpo_rewards
import trl_setup
from rich.console import Console


def test_wrong_arguments(capsys, tmp_path):
    for arguments, said in (["--steps=3"], "--steps must be at least 4"), (["--arms=dense"], "not among stock"):
        with pytest.raises(SystemExit):
            grpo_rewards.parse_arguments([f"--model={tmp_path}", *arguments])
        assert said in capsys.readouterr().err


def test_what_a_completion_is_worth():
    completions = [" It is 4.\n#### 4", " 4", " #### 5", " no\nQuestion: next\n#### 4"]
    assert grpo_rewards.reward(completions, ["#### 4"] * 4) == [1.2, 0.0, 0.2, 0.0]


def test_the_table():
    results = [{"arm": "stock", "seed": seed, "reward": [0.0] * 2 + [0.25 + seed] * 2 + [0.5] * 4} for seed in range(2)]
    console = Console(width=150, record=True)
    console.print(grpo_rewards.table({"machine": {"device": "a card"}, "results": [*results, {"arm": "ours"}]}))
    text = console.export_text()
    assert "0.750 ± 0.707 (2)" in text and "steps 7 to 8" in text and "failed" in text


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    folder = tmp_path / "model"
    trl_setup.tokenizer().save_pretrained(folder)
    trl_setup.model().save_pretrained(folder)
    found = tmp_path / "found.json"
    assert grpo_rewards.main(["--tiny", f"--model={folder}", "--prompt-length=512", f"--json={found}"]) == 0
    results = json.loads(found.read_text())["results"]
    assert [len(record["reward"]) for record in results] == [4, 4]
    assert results[1]["metrics"]["level"] == "routed"
