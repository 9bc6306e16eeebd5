"""The benchmark of TRL's updates: its arms train what they say, generation is no part of a step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("trl")

import trainer_step
import trl_setup
from gsm8k_prompts import result
from rich.console import Console


def test_wrong_arguments(capsys, tmp_path):
    for arguments, said in (
        (["--measured=48"], "--measured must be at least 1 and less than --steps"),
        (["--arms=dense"], "not among stock"),
    ):
        with pytest.raises(SystemExit):
            trainer_step.parse_arguments([f"--model={tmp_path}", *arguments])
        assert said in capsys.readouterr().err


def test_preferences_differ_in_the_result():
    row = trainer_step._preferences(3)[0]
    chosen, rejected = (row[name][0]["content"] for name in ("chosen", "rejected"))
    assert result(chosen) != result(rejected) and len(chosen) - len(rejected) in (-2, -1, 0, 1)
    assert trainer_step._reward([row["chosen"], row["rejected"]], [chosen, chosen]) == [1.0, 0.0]


def test_what_prepares_a_batch_is_apart(monkeypatch):
    seconds = iter([0.0, 1.0, 4.0, 4.5, 9.0, 10.0, 10.0, 10.0, 12.0])
    monkeypatch.setattr(trainer_step.time, "perf_counter", lambda: next(seconds))
    turns = []
    clock = trainer_step._clock("cpu", 1, lambda: turns.append(len(clock.steps)))
    trainer = type("Trainer", (), {"_prepare_inputs": lambda self, batch: batch})()
    trainer_step._count_apart(trainer, clock)
    for _ in range(2):
        clock.on_step_begin(None, SimpleNamespace(max_steps=2), None)
        assert trainer._prepare_inputs(3) == 3
        clock.on_step_end(None, None, None)
    assert turns == [1] and clock.steps == [1.5, 2.0] and clock.summary()["step_ms"] == 2000.0


def test_the_table():
    results = [
        {"method": "sft", "arm": "stock", "step_ms": 30.0, "peak_mb": 400.0, "loss": 1.0},
        {
            "method": "sft",
            "arm": "ours",
            "step_ms": 10.0,
            "peak_mb": 100.0,
            "loss": 1.0,
            "metrics": {"level": "routed"},
        },
        {"method": "dpo", "arm": "ours", "error": "no memory"},
    ]
    console = Console(width=150, record=True)
    console.print(trainer_step.table({"machine": {"device": "a card"}, "results": results}))
    text = console.export_text()
    assert "3.00" in text and "4.00" in text and "routed" in text and "failed" in text


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    """Shapes with random weights need a tokenizer only."""
    folder = tmp_path / "tokenizer"
    made = trl_setup.tokenizer()
    made.save_pretrained(folder)
    run = ["--tiny", f"--model={folder}", '--options={"compiler": "eager"}', f"--json={tmp_path / 'found.json'}"]
    assert trainer_step.main(run) == 0
    results = trainer_step.json.loads((tmp_path / "found.json").read_text())["results"]
    assert [r["arm"] for r in results] == ["stock", "ours"] and results[1]["metrics"]["level"] == "routed"
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-2)
