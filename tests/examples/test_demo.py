"""What a newcomer runs first: four runs from one state, a report whose words follow from its figures."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import demo
import demo_arms
import train_gsm8k
from chat_data import IGNORE
from comparison import RunRecord, StepTimes
from demo_report import difference, table, verdict

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["dense", "cggr", "dense, half batch", "random tokens"]
TINY = [
    *("--model-size=nano", "--compiler=eager", "--seq-len=256", "--others=2", "--most-labels=60", "--batch-size=2"),
    *("--steps=6", "--pretrain-steps=4", "--evals=2", "--eval-size=3"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The first lines of the shipped text."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train.jsonl", 400), ("test.jsonl", 20)):
        lines = (ROOT / "data" / "gsm8k" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:count]), encoding="utf-8")
    return folder


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_four_runs_from_one_state_and_a_report(data, tmp_path, capsys):
    assert demo.main([*TINY, f"--data={data}", f"--out={tmp_path}"]) == 0
    found = results(tmp_path)
    runs = {run["name"]: run for run in found["runs"]}
    assert list(runs) == NAMES and not found["interrupted"] and found["equal_time"]
    assert {run["held_out"][0][1] for run in found["runs"]} == {found["runs"][0]["held_out"][0][1]}
    assert len({run["held_out"][-1][1] for run in found["runs"]}) == 4
    for run in found["runs"]:
        assert [step for step, _ in run["held_out"]][:3] == [0, 3, 6]
        assert len(run["held_out"]) == len(run["held_out_sums"])
        for (_, loss), sums in zip(run["held_out"], run["held_out_sums"], strict=True):
            assert loss == pytest.approx(sum(sums) / sum(found["held_out_labels"]))
    # the defaults, and as many random positions as they come to
    ours, control = runs["cggr"]["metrics"], runs["random tokens"]["metrics"]
    assert runs["cggr"]["options"] == {"compiler": "eager"}
    assert ours["matched"] and ours["selection"] == "labels" and ours["gradient_tokens"] > ours["tokens_selected"] > 0
    share = runs["random tokens"]["options"]["min_tokens_ratio"]
    assert control["matched"] and control["gradient_tokens"] == pytest.approx(share * found["positions"], rel=0.05)
    # up to equal time, and no more
    most = demo_arms.MOST * 6
    for name in ("cggr", "dense, half batch"):
        assert 6 <= len(runs[name]["train_loss"]) == runs[name]["held_out"][-1][0] <= most
    assert len(runs["dense"]["train_loss"]) == len(runs["random tokens"]["train_loss"]) == 6
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert found["verdict"][-1].startswith("Here it ")
    out = capsys.readouterr().out
    assert "equal steps: after 6" in out and found["verdict"][0] in out
    assert found["verdict"][0] in (tmp_path / "report.txt").read_text()


@pytest.mark.slow
def test_an_interrupt_leaves_a_partial_report(data, tmp_path, monkeypatch, capsys):
    step, count = demo_arms.FineTuning.next_step, []

    def interrupted(self):
        count.append(1)
        if len(count) == 18:  # of the fifth round
            signal.raise_signal(signal.SIGINT)
        step(self)

    monkeypatch.setattr(demo_arms.FineTuning, "next_step", interrupted)
    assert demo.main([*TINY, f"--data={data}", f"--out={tmp_path}"]) == 130
    found = results(tmp_path)
    assert found["interrupted"] and not found["equal_time"]
    assert [[step for step, _ in run["held_out"]] for run in found["runs"]] == [[0, 3]] * 4
    assert "After 3 steps each" in " ".join(found["verdict"])
    assert not any("of training each" in line for line in found["verdict"])
    assert "Interrupted" in capsys.readouterr().out and (tmp_path / "loss.png").exists()


def test_the_former_demo_is_behind_a_flag(monkeypatch):
    got = []
    monkeypatch.setattr(train_gsm8k, "main", lambda argv: got.append(argv) or 3)
    assert demo.main(["--steps", "7", "--from-scratch", "--selection=topk"]) == 3
    assert got == [["--steps", "7", "--selection=topk"]]


@pytest.mark.parametrize("argument", ["--steps=3", "--batch-size=3", "--eval-size=1", "--model-size=huge"])
def test_a_wrong_argument_is_refused_before_any_work(argument, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        demo.main([f"--out={tmp_path / 'out'}", argument])
    assert end.value.code == 2 and argument.split("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# The words follow from the figures.

LABELS = [10, 20, 30, 40]


def record(
    name: str, step: float, equal: float, end: tuple[int, float] | None = None, noise: float = 0.0, **facts: object
) -> RunRecord:
    """Ten steps of so many seconds; held-out losses after them, and after ``end``; ``noise`` of single problems."""
    held_out = [(0, 5.0), (10, equal)] + ([end] if end else [])
    times = StepTimes([step / 4] * 10, [step / 2] * 10, [9.0] * 3 + [step] * 7)
    signs = [1, -1, 1, -1]
    sums = [[loss * count + sign * noise for count, sign in zip(LABELS, signs, strict=True)] for _, loss in held_out]
    return RunRecord(
        name, None if name.startswith("dense") else {}, [1.0] * 10, held_out, sums, training=times, **facts
    )


def four(ours: RunRecord, *, half: float = 3.9) -> list[RunRecord]:
    return [
        record("dense", 1.0, 4.0),
        ours,
        record("dense, half batch", 0.5, 4.2, (20, half)),
        record("random tokens", 0.5, 4.3),
    ]


SETUP = {"held_out_labels": LABELS, "equal_time": True, "positions": 100}


@pytest.mark.parametrize(
    ("ours", "half", "words"),
    [
        (record("cggr", 0.4, 4.01, (25, 3.8), noise=1.0), 3.9, "Here it paid: what dense steps learn, 2.5 times"),
        (record("cggr", 0.4, 4.01, (25, 3.8)), 3.9, "Here it paid in time: a step learns less"),
        (record("cggr", 0.4, 4.0, (25, 3.8)), 3.9, "2.5 times as fast, and a lower loss than dense training"),
        (record("cggr", 0.4, 4.0, (25, 3.8)), 3.7, "Here it did not pay: steps are 2.5 times"),
        (record("cggr", 0.4, 4.1, (25, 4.1)), 4.1, "Here it did not pay: steps are 2.5 times"),
        (record("cggr", 0.99, 3.5, (10, 3.5)), 3.9, "Here it did not pay: the steps are no faster"),
    ],
)
def test_the_last_sentence_follows_from_the_figures(ours, half, words):
    lines = verdict(four(ours, half=half), SETUP)
    assert words in lines[-1]
    assert lines[0].startswith(f"A step took {ours.typical('step'):.2f} s against 1.00 s dense")
    best = min(4.0, half)
    assert f"held-out loss {ours.held_out[-1][1]:.3f} against {best:.3f}" in lines[2]
    assert "4.300 (random tokens)" in lines[3]


def test_what_was_not_rewritten_is_said_first():
    metrics = {"matched": False, "fallback_reason": "no loss", "gradient_tokens": None}
    (line,) = verdict(four(record("cggr", 1.0, 4.0, metrics=metrics)), SETUP)
    assert "NOT rewritten (no loss)" in line


def test_a_report_on_runs_that_have_hardly_begun():
    few = record("cggr", 0.4, 4.0)
    few.training = StepTimes([1.0], [1.0], [1.0])
    assert verdict([record("dense", 1.0, 4.0)], SETUP) == verdict(four(few), SETUP)
    assert "Too few steps" in verdict(four(few), SETUP)[0]
    assert table([record("dense", 1.0, 4.0), few], SETUP).row_count == 10


def test_the_standard_error_is_that_of_a_ratio():
    one, other = record("cggr", 1.0, 4.1, noise=0.7), record("dense", 1.0, 4.0)
    mean, error = difference(one, 10, other, 10, LABELS)
    assert mean == pytest.approx(0.1)
    # drawing problems again and again, with replacement, says about the same
    counts = torch.tensor(LABELS, dtype=torch.float64)
    excess = torch.tensor(one.held_out_sums[1], dtype=torch.float64) - torch.tensor(other.held_out_sums[1])
    drawn = torch.randint(4, (20_000, 4), generator=torch.Generator().manual_seed(0))
    spread = float((excess[drawn].sum(1) / counts[drawn].sum(1)).std())
    assert error == pytest.approx(spread, rel=0.35)


def test_a_run_compiles_in_the_steps_of_another_of_its_model():
    before = RunRecord("problems", training=StepTimes([], [], [9.0, 1.0, 1.0, 1.0, 1.0]))
    run = RunRecord("dense", compiled_in=before.training, training=StepTimes([], [], [2.0] * 7))
    assert run.compile_s == before.compile_s == pytest.approx(8.0) and run.typical("step") == 2.0


def test_all_sizes_of_a_batch_see_the_same_sequences(data, tmp_path):
    args = demo.parse_arguments([*TINY, f"--data={data}", f"--out={tmp_path}"])
    task = demo.make_task(args)
    runs = [
        demo_arms.FineTuning(arm, RunRecord(arm.name), torch.nn.Linear(1, 1), task, args, bar=0)
        for arm in (
            demo_arms.Arm("dense", None, 2),
            demo_arms.Arm("half", None, 1),
            demo_arms.Arm("random", {}, 2, prompts_too=True),
        )
    ]
    ids, labels = runs[0].batch(1)
    halves = [runs[1].batch(step) for step in (2, 3)]
    assert torch.equal(ids, torch.cat([half for half, _ in halves]))
    assert torch.equal(labels, torch.cat([half for _, half in halves]))
    answers = (labels != IGNORE).sum()
    assert 0 < answers <= 2 * args.most_labels + 2
    same, everything = runs[2].batch(1)
    assert torch.equal(same, ids) and (everything != IGNORE).sum() > 2 * answers
    assert bool((everything[labels != IGNORE] == labels[labels != IGNORE]).all())


def test_prompts_show_problems_without_solutions(data, tmp_path):
    from gsm8k_prompts import problems, write_prompts

    path, _ = write_prompts(data, tmp_path, 2, solved=False)
    bank = {question for question, _ in problems(data / "train.jsonl")[:200]}
    for line in path.read_text(encoding="utf-8").splitlines()[:5]:
        record = json.loads(line)
        *others, own = record["prompt"].split("\n\nQuestion: ")
        assert len(others) == 2 and own not in bank and "Answer:" not in record["prompt"] and record["answer"]
        assert all(other.removeprefix("Question: ") in bank for other in others)
