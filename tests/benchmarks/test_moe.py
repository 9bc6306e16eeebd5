"""The benchmark of Mixture-of-Experts layers: it compares what is the same, and says so when it is not."""

from __future__ import annotations

import json

import moe
import moe_arms
import moe_rows
import moe_sweep
import pytest
import torch
from moe_arms import SHAPES
from torch.utils.flop_counter import FlopCounterMode

RUN = ["--tiny", "--repeats=2"]


def test_every_arm_runs_and_agrees(tmp_path, capsys) -> None:
    path = tmp_path / "moe.json"
    assert moe.main([*RUN, f"--json={path}"]) == 0
    document = json.loads(path.read_text())
    (result,) = document["results"]
    assert list(result["arms"]) == list(moe_arms.ARMS) and result["rounds"] == 2
    for arm, record in result["arms"].items():
        assert record["forward"]["median"] > 0 and record["backward"]["median"] > 0 and record["tflops"] > 0
        assert arm == "dense" or record["difference"] < 1e-5
    assert {"device", "torch", "command"} <= set(document["machine"])
    assert all(arm in capsys.readouterr().out for arm in ["grouped_mm"])


def test_an_arm_that_computes_something_else_is_a_failure(tmp_path, monkeypatch) -> None:
    wrong = lambda layer, hidden: moe_arms._grouped_mm(layer, hidden) * 1.01  # noqa: E731
    monkeypatch.setattr(moe_arms, "_ours", wrong)
    path = tmp_path / "moe.json"
    assert moe.main([*RUN, "--arms", "grouped_mm", "ours", f"--json={path}"]) == 1
    (result,) = json.loads(path.read_text())["results"]
    assert "not the function that grouped_mm computes" in result["arms"]["ours"]["error"]
    assert result["arms"]["grouped_mm"]["step"]["median"] > 0


def test_the_backward_from_some_rows(tmp_path, capsys, monkeypatch) -> None:
    path = tmp_path / "rows.json"
    run = [*RUN, "--rows", "0.25", "0.05", f"--json={path}"]
    assert moe.main(run) == 0
    (result,) = json.loads(path.read_text())["results"]
    assert [record.get("tokens") for record in result["rows"].values()] == [64, 16, 3, None]
    assert all(record["ms"] > 0 for record in result["rows"].values()) and "floor:" in capsys.readouterr().out
    assert result["floor_bytes"] == 2 * 4 * (4 * 32 * 32 + 4 * 32 * 16)
    right = moe_rows.Backward.of_rows
    monkeypatch.setattr(moe_rows.Backward, "of_rows", lambda self, grad, rows: right(self, grad, rows.flip(0)))
    with pytest.raises(RuntimeError, match=r"the gradients from 0\.25 of the rows"):
        moe.main(run)


def test_tied_choices_are_not_compared() -> None:
    layer = moe_arms.build_weights(SHAPES["tiny"], "cpu", torch.float32)
    hidden = torch.randn(6, 32)
    hidden[2] = 0.0
    assert moe_arms.clear_choices(layer, hidden).tolist() == [True, True, False, True, True, True]


def test_flops_are_those_of_the_dense_arm() -> None:
    shape = SHAPES["tiny"]
    layer = moe_arms.build_weights(shape, "cpu", torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        moe_arms.build_arm("dense", layer)(torch.randn(shape.tokens * shape.top_k, shape.hidden))
    assert counter.get_total_flops() == shape.flops


@pytest.mark.parametrize("kernel", moe_sweep.KERNELS)
def test_settings_are_distinct(kernel) -> None:
    found = [tuple(sorted(setting.items())) for setting in moe_sweep.settings(kernel)]
    assert len(set(found)) == len(found) > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny", "--repeats=0"], "--repeats"),
        (["--tiny", "--sweep"], "CUDA"),
        (["--arms=fair"], "--arms"),
        (["--tiny", "--rows=1"], "--rows"),
    ],
)
def test_wrong_arguments(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit):
        moe.main(arguments)
    assert message in capsys.readouterr().err
