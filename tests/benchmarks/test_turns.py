"""Processes that prepare at once and measure one after the other."""

from __future__ import annotations

import subprocess
import sys

import torch
from turns import cards, in_turns

# writes when it began and ended its measurement; "fails" and "slow" do not get so far
PROGRAM = """
import json, sys, time
sys.path.insert(0, sys.argv[2])
from turns import wait_for_turn
prepared = time.monotonic()
if sys.argv[1] == "fails":
    sys.exit("no memory")
if sys.argv[1] == "slow":
    time.sleep(60)
wait_for_turn(sys.stdout)
begin = time.monotonic()
time.sleep(0.05)
print(json.dumps({"prepared": prepared, "begin": begin, "end": time.monotonic()}))
"""


def commands(names: list[str]) -> dict[str, list[str]]:
    benchmarks = in_turns.__globals__["__file__"].rpartition("/")[0]
    return {name: [sys.executable, "-c", PROGRAM, name, benchmarks] for name in names}


def test_one_measures_while_the_others_wait(tmp_path):
    found = dict(in_turns(commands(["a", "fails", "b"]), [""], tmp_path))
    assert list(found) == ["a", "fails", "b"] and found["fails"] == {"error": "no memory"}
    a, b = found["a"], found["b"]
    assert max(a["prepared"], b["prepared"]) <= a["begin"] < a["end"] <= b["begin"]


def test_so_many_at_once(tmp_path):
    found = dict(in_turns(commands(["a", "b"]), [""], tmp_path, at_once=1))
    assert found["a"]["end"] <= found["b"]["prepared"]


def test_one_that_prepares_for_too_long_is_ended(tmp_path):
    found = dict(in_turns(commands(["slow", "fails"]), [""], tmp_path, within=5))
    assert found == {"slow": {"error": "it had not prepared in time"}, "fails": {"error": "no memory"}}


def test_one_that_nobody_waits_for_measures_nothing():
    (command,) = commands(["a"]).values()
    found = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert found.returncode == 1 and found.stdout == '{"ready": true}\n' and "nobody waits" in found.stderr


def test_the_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cards("cuda") == ["0", "1"] and cards("cpu") == [""]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert cards("cuda") == ["3", "5"]
