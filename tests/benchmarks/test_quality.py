"""quality.py: equal measured seconds, results that can be continued, controls that mean what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import quality
import quality_arms
import quality_report
import quality_run
import quality_study
from quality_text import Blocks

from cggr_compile import Options


def command(folder: Path, *more: str) -> list[str]:
    return ["--tiny", f"--cache={folder / 'cache'}", f"--out={folder / 'out'}", *more]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense, random tokens, a quarter of dense's steps; on the CPU, without generated code."""
    folder = tmp_path_factory.mktemp("quality")
    more = ["--arms=dense,random", '--arm=quarter={"dense": true, "steps": 0.25}', "--seconds=1.5"]
    torch._dynamo.reset()
    assert quality.main(command(folder, *more)) == 0
    return folder


def runs(folder: Path) -> dict[str, dict[str, Any]]:
    results = json.loads((folder / "out" / "quality.json").read_text())["results"]
    return {r["arm"]: r for r in results}


@pytest.mark.slow
def test_arms_train_for_equal_seconds(study: Path) -> None:
    found = runs(study)
    for arm in ("dense", "random"):
        assert found[arm]["seconds"] == pytest.approx(1.5, rel=0.2), arm
        assert found[arm]["tokens"] == 1024 * found[arm]["steps"]
    assert found["quarter"]["steps"] == round(found["dense"]["steps"] / 4)
    assert (
        found["random"]["metrics"]["ratio"] == 0.25 and found["random"]["metrics"]["step"] == found["random"]["steps"]
    )


@pytest.mark.slow
def test_training_is_training(study: Path) -> None:
    """From one start; more time, more learning: a harness that does not train cannot pass."""
    found = runs(study)
    assert len({r["curve"][0][2] for r in found.values()}) == 1
    for arm in ("dense", "random"):
        assert found[arm]["final"] < found[arm]["curve"][0][2] - 0.3
    assert found["dense"]["final"] < found["quarter"]["final"] < found["dense"]["curve"][0][2]


@pytest.mark.slow
def test_files_and_report(study: Path) -> None:
    out = study / "out"
    assert {path.name for path in out.iterdir()} == {"quality.json", "quality.txt", "quality.png"}
    found, table = runs(study), (out / "quality.txt").read_text()
    assert f"{found['dense']['final']:.3f} (1)" in table
    assert f"{found['random']['final'] - found['dense']['final']:+.3f}" in table


@pytest.mark.slow
def test_what_is_there_is_not_run_again(study: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(quality_study, "Trainer", None)
    before = (study / "out" / "quality.json").read_text()
    arms = "--arms=dense,random"
    assert quality.main(command(study, arms, "--seconds=1.5")) == 0
    assert quality.main(command(study, arms, "--seconds=1.5", "--seeds=2", "--time-limit=1")) == 0, "no time for more"
    assert "stopped before scratch 1024 dense" in capsys.readouterr().out
    assert quality.main(command(study, arms, "--seconds=3")) == 2
    assert "another set-up (seconds: 1.5 there, 3.0 here)" in capsys.readouterr().out
    assert (study / "out" / "quality.json").read_text() == before


def test_best_rate_of_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        compile_s = 0.1

        def __init__(self, options: Any, *args: Any, **kwargs: Any) -> None:
            if options is not None:
                raise torch.OutOfMemoryError("no room")

        def train(self, start: Any, *, lr: float, budget: float, seed: int, **more: Any) -> dict[str, Any]:
            final = float("nan") if lr == 1.0 else abs(lr - 0.02)
            curve = [[0.0, 0, 9.0], [budget, 5, final]]
            return {"seconds": budget, "steps": 5, "tokens": 9, "final": final, "curve": curve, "metrics": None}

    monkeypatch.setattr(quality_study, "Trainer", Fake)
    more = ["--arms=dense,random,dense-half-steps", "--lrs=1.0,0.01,0.02,0.03", "--seeds=2", "--sweep-share=0.5"]
    assert quality.main(command(tmp_path, *more)) == 1, "an arm failed"
    results = json.loads((tmp_path / "out" / "quality.json").read_text())["results"]
    dense = [(r["lr"], r["seed"], r["sweep"], r["seconds"]) for r in results if r["arm"] == "dense"]
    assert dense == [*((lr, 0, True, 1.0) for lr in (1.0, 0.01, 0.02, 0.03)), *((0.02, s, False, 2.0) for s in (0, 1))]
    half = [r["seconds"] for r in results if r["arm"] == "dense-half-steps"]
    assert half == [0.5] * 4 + [1.0] * 2, "half of the seconds"
    (failed,) = [r for r in results if r["arm"] == "random"]
    assert failed["error"] == "OutOfMemoryError: no room"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm=x"], "name=JSON"),
        (["--arm=x={"], "not JSON"),
        (['--arm=x={"min_token_ratio": 0.5}'], "did you mean 'min_tokens_ratio'"),
        (['--arm=x={"batch": 2}'], r"batch must be in (0, 1]"),
        (['--arm=x={"dense": true, "seed": 1}'], "is dense"),
        (['--arm=topk={"dense": true}'], "the table has an arm"),
        (["--arms=dens"], "not among dense"),
        (["--batches=1000"], "even number of sequences of 64"),
        (["--seconds=0"], "--seconds"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        quality.main(["--tiny", *arguments])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_the_table_of_arms_is_valid() -> None:
    for name, arm in quality_arms.ARMS.items():
        options = arm.resolved(usual_labels=7, dense_steps=100)
        Options.parse(options)
        assert (options is None) == name.startswith("dense") or name == "dense-first"
    assert quality_arms.ARMS["labels"].resolved(usual_labels=7, dense_steps=None)["max_selected"] == 7
    assert quality_arms.ARMS["curriculum"].resolved(usual_labels=7, dense_steps=200)["warmup_steps"] == 30
    assert all(set(names) <= set(quality_arms.ARMS) for names in quality_arms.DEFAULTS.values())


def test_differences_and_spread() -> None:
    ours, theirs = ([{"status": "ok", "final": value} for value in values] for values in ((1.0, 2.0), (2.0, 2.5)))
    assert quality_report.difference(ours, theirs) == "-0.750" and quality_report.difference(ours, []) == "–"
    assert quality_report.spread([1.0, 2.0]) == "1.500 ± 0.707 (2)"


# ---------------------------------------------------------------------------------------------------------------
# Training


def test_learning_rate_ends_at_zero() -> None:
    rates = [quality_run.learning_rate(2.0, i / 1000) for i in range(1001)]
    assert max(rates) == rates[50] == 2.0 and rates[0] == rates[1000] == 0.0
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_half_batches_see_the_same_order() -> None:
    blocks = Blocks(torch.arange(10)[:, None], torch.arange(10)[:, None])
    whole, half = (quality_run.batches(blocks, size, seed=3) for size in (4, 2))
    for _ in range(7):  # beyond two epochs
        assert torch.equal(next(whole)[0], torch.cat([next(half)[0], next(half)[0]]))


def test_bfloat16_weights_keep_small_updates() -> None:
    """Updates a thousandth of a weight's last place add up in the masters, and so reach the model."""
    moved = {}
    for masters in (True, False):
        model = torch.nn.Linear(4, 4, bias=False).bfloat16()
        start = {"weight": torch.ones(4, 4)}
        optimizer = quality_run.Masters(model, start)
        if not masters:
            optimizer.adam = torch.optim.AdamW(model.parameters(), lr=0.0)
            optimizer.masters = optimizer.parameters
        for _ in range(100):
            model(torch.ones(1, 4).bfloat16()).sum().backward()
            optimizer.step(1e-4)
            assert model.weight.grad is None
        moved[masters] = 1.0 - float(model.weight.detach().float().mean())
    assert moved[True] == pytest.approx(0.01, rel=0.3) and moved[False] == 0.0
