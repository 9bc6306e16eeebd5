"""Two processes for all tests that need them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

TESTS = Path(__file__).parent.parent
WORLD = 2


class Results(Mapping):
    """What every process has computed, by case; a case that has raised raises here.

    ``folder``: where they have written.
    """

    def __init__(self, by_rank: list[dict[str, Any]], folder: Path) -> None:
        self._by_rank, self.folder = by_rank, folder

    def __getitem__(self, case: str) -> list[Any]:
        found = [results[case] for results in self._by_rank]
        assert not any(isinstance(result, str) for result in found), "\n".join(map(str, found))
        return found

    def __iter__(self) -> Any:
        return iter(self._by_rank[0])

    def __len__(self) -> int:
        return len(self._by_rank[0])


def run_cases(folder: Path, kind: str) -> None:
    """Every case of one kind, ``quick`` or ``slow``, one after the other."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(TESTS / "distributed_worker.py")]
    processes = [
        subprocess.Popen([*command, str(rank), str(WORLD), str(folder), kind], env=environment, stderr=subprocess.PIPE)
        for rank in range(WORLD)
    ]
    try:
        errors = [process.communicate(timeout=400)[1].decode()[-3000:] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, errors


def once(factory: pytest.TempPathFactory, kind: str) -> Results:
    """The cases of one kind, run by whichever of pytest's own workers comes first."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"ranks-{kind}"
    folder.mkdir(exist_ok=True)
    files = [folder / f"{rank}.pt" for rank in range(WORLD)]
    with FileLock(folder / "lock"):
        if not all(file.exists() for file in files):
            run_cases(folder, kind)
    return Results([torch.load(file, weights_only=False) for file in files], folder)


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Of the quick cases of ddp_cases.py, decision_cases.py, fsdp_cases.py and shard_cases.py, by case and rank."""
    return once(tmp_path_factory, "quick")


@pytest.fixture(scope="session")
def slow_results(tmp_path_factory):
    """Of the other ones."""
    return once(tmp_path_factory, "slow")
