"""The benchmark of several processes: its arms are what they say, and its table follows from the samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import distributed
import distributed_arms
import distributed_results
from distributed_results import figures, planned, rich_table, scaling, times_faster

ROOT = Path(__file__).resolve().parent.parent.parent


def record(arm: str, step: float, ratio: float | None = None, **more: Any) -> dict[str, Any]:
    sent = {"reduced": 10**9, "gathered_forward": 0, "gathered_backward": 0}
    common = {"peak_mb": 100.0, "held_mb": 50.0, "sent": sent}
    return {"status": "ok", "arm": arm, "ratio": ratio, "step": step, **common, **more}


RESULT: dict[str, Any] = {
    "shape": "tiny",
    "world": 2,
    "batch": 2,
    "length": 50,
    "dtype": "float32",
    "layers": None,
    "rounds": 3,
    "arms": {
        "alone-dense": record("alone-dense", 10.0),
        "alone 0.25": record("alone", 5.0, 0.25),
        "alone 0.05": record("alone", 2.0, 0.05),
        "ddp-dense": record("ddp-dense", 12.0),
        "fsdp-dense": record("fsdp-dense", 20.0),
        "ddp 0.25": record("ddp", 6.0, 0.25, reduction=4.0, exposed=1.0, hidden=0.75),
        "fsdp 0.25": {"status": "failed", "error": "out of memory\nhere", "arm": "fsdp", "ratio": 0.25},
    },
}


def test_figures_are_compared_within_a_round() -> None:
    found = figures(
        {"step": [9.0, 1.0, 2.0], "reduced": [10.0, 30.0, 12.0], "unreduced": [8.0, 27.0, 9.0], "reduction": [4.0]}
    )
    assert found["step"] == 2.0 and found["exposed"] == 3.0 and found["hidden"] == 0.25
    assert set(figures({"step": [1.0]})) == {"step"}


def test_scaling_is_against_the_same_work() -> None:
    assert scaling(RESULT, "ddp 0.25") == 5.0 / 6.0
    assert scaling(RESULT, "ddp-dense") == 10.0 / 12.0
    assert times_faster(RESULT, "ddp 0.25") == 2.0, "the better dense arm of as many processes"
    assert times_faster(RESULT, "alone 0.25") == 2.0


def test_table_has_a_row_per_arm() -> None:
    table = rich_table(RESULT)
    cells = [list(column.cells) for column in table.columns]
    rows = {row[0]: row[1:] for row in zip(*cells, strict=True)}
    assert list(rows) == list(RESULT["arms"])
    assert rows["ddp 0.25"] == ("6.0", "2.00", "33333", "150", "83.3", "4.0", "1.0", "75", "39.4")
    assert rows["alone 0.25"][2] == "20000" and rows["fsdp 0.25"] == ("–",) * 9
    assert "fsdp 0.25 failed: out of memory" in str(table.caption)


def test_many_cards_on_paper() -> None:
    # 2 GB at 1 TB/s, half of it not sent with two cards: 1 ms, three quarters of it hidden
    assert planned(RESULT, "ddp 0.25", 2, 1000.0) == pytest.approx(5.0 + 0.25)
    assert planned(RESULT, "ddp 0.25", 64, 100.0) == pytest.approx(5.0 + 19.6875 - 5.0), "no more than it computes"
    assert planned(RESULT, "ddp-dense", 2, 1000.0) == pytest.approx(10.0), "not measured: all of it hidden"
    sent = {"reduced": 10**9, "gathered_forward": 10**9, "gathered_backward": 10**9}
    sharded = {**RESULT, "arms": {**RESULT["arms"], "shard 0.25": record("shard", 5.5, 0.25, sent=sent)}}
    assert planned(sharded, "shard 0.25", 64, 100.0) == pytest.approx(5.0 + 29.53125 - 5.0)
    assert planned(RESULT, "alone 0.25", 2, 1.0) is None


def test_needs_torchrun(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for arguments, said in [([], "torchrun"), (["--ratios=1.0"], "--ratios"), (["--profile"], "--profile")]:
        with pytest.raises(SystemExit):
            distributed.parse_arguments(arguments)
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_command_measures_every_arm(tmp_path: Path) -> None:
    path = tmp_path / "new" / "distributed.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["benchmarks/distributed.py", "--shapes=tiny", "--compiler=eager", "--repeats=2", "--ratios=0.25"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run(
        [*command, f"--json={path}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (result,) = json.loads(path.read_text())["results"]
    assert result["world"] == 2 and result["rounds"] == 2
    assert [arm["arm"] for arm in result["arms"].values()] == list(distributed_arms.DEFAULT_ARMS)
    for arm in result["arms"].values():
        assert arm["status"] == "ok" and arm["step"] > 0 and arm["held_mb"] > 0, arm
        assert arm["arm"].startswith("alone") or arm["reduction"] > 0
        if arm["arm"].startswith(("ddp", "fsdp")):
            assert len(arm["samples"]["unreduced"]) == 2
        if arm["arm"] in distributed_arms.SELECTIVE:
            assert arm["metrics"]["matched"] and arm["metrics"]["ratio"] == 0.25
    # a sharded model's parameters are spread, a replicated one's are not
    for sharded in ("fsdp-dense", "shard-dense", "shard 0.25"):
        assert result["arms"][sharded]["held_mb"] < 0.6 * result["arms"]["ddp-dense"]["held_mb"]
    assert "ddp 0.25" in run.stdout and distributed_results.COLUMNS[0] in run.stdout
