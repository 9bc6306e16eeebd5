"""The example is what a newcomer runs first: it must write its whole report, and a partial one after Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--model-size=nano", "--batch-size=2", "--seq-len=32", "--eval-blocks=4", "--compiler=eager"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The first lines of the shipped text."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train.jsonl", 300), ("test.jsonl", 10)):
        lines = (ROOT / "data" / "gsm8k" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:count]), encoding="utf-8")
    return folder


def command(data: Path, out: Path, *arguments: str) -> list[str]:
    script = ROOT / "examples" / "train_gsm8k.py"
    return [sys.executable, str(script), *SMALL, f"--data={data}", f"--out={out}", *arguments]


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_full_run_reports_all_three_runs(data, tmp_path):
    run = subprocess.run(
        command(data, tmp_path, "--steps=6", "--evals=2", "--timed-steps=2"),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = results(tmp_path)
    assert not found["interrupted"]
    assert [record["name"] for record in found["runs"]] == ["dense", "selective", "random control"]
    for record in found["runs"]:
        assert [step for step, _ in record["held_out"]] == [0, 3, 6]
        assert record["summary"]["median_step_s"] > 0
        assert record["final"] > 0
        assert len(record["training"]["step"]) == 6
        assert len(record["alternating"]["step"]) == 2
    # same weights and batches: equal before the first step, and different after it, or nothing was selected
    before, after = zip(
        *[(record["held_out"][0][1], record["held_out"][-1][1]) for record in found["runs"]], strict=True
    )
    assert max(before) - min(before) < 1e-4
    assert len(set(after)) == 3
    for record in found["runs"][1:]:
        assert record["metrics"]["matched"] is True, record["metrics"]["fallback_reason"]
        assert record["metrics"]["token_ratio"] == pytest.approx(0.25, abs=0.05)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "held-out loss" in (tmp_path / "report.txt").read_text()
    for arm in ("selective", "random_control"):
        assert list((tmp_path / "graphs" / arm).rglob("*.py")), f"no dumped graph of {arm}"
    # the verdict names the dense run whichever way it went
    assert any("equal steps" in line and "dense" in line for line in found["verdict"])


@pytest.mark.slow
def test_interrupt_leaves_a_partial_report(data, tmp_path):
    process = subprocess.Popen(
        command(data, tmp_path, "--steps=20000", "--evals=2000"),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell that runs the tests in the background ignores SIGINT, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 180
        while not ((tmp_path / "results.json").exists() and len(results(tmp_path)["runs"][0]["held_out"]) > 2):
            assert process.poll() is None and time.monotonic() < deadline, "the run never got going"
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 130, output
    found = results(tmp_path)
    assert found["interrupted"]
    assert [record["name"] for record in found["runs"]] == ["dense"]
    assert len(found["runs"][0]["held_out"]) > 2
    assert (tmp_path / "loss.png").exists()
    assert "held-out loss" in (tmp_path / "report.txt").read_text()
    assert "Interrupted" in output


@pytest.mark.slow
def test_a_wrong_option_is_refused_before_any_work(data, tmp_path):
    run = subprocess.run(
        command(data, tmp_path / "out", "--selection=topkk"),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2
    assert "selection" in run.stderr and "'topk'" in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_callback_swallows_is_seen_at_the_next_step():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from interrupt import Interrupt
    finally:
        sys.path.pop(0)

    class Dies:
        pass

    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        interrupt.requested = False
        thing = Dies()
        reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        del thing  # Python prints the KeyboardInterrupt of the callback and goes on
        assert reference() is None
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
    assert signal.getsignal(signal.SIGINT) is before
