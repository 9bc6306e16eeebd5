"""Two GPUs and NCCL: the averaged gradients of what each process has selected, and decisions that both make."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nccl_worker as worker
import pytest
import torch
from reference import Picks, hf_reference

WORLD = 2
TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if torch.cuda.device_count() < WORLD:
        pytest.skip("needs two CUDA devices")
    return run_cases(tmp_path_factory.mktemp("ranks"), "cuda")


def run_cases(folder, device):
    """What every process has computed, by rank and case."""
    paths = [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(Path(worker.__file__))]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), str(folder), device], env=environment, stderr=subprocess.PIPE
        )
        for rank in range(WORLD)
    ]
    try:
        errors = [process.communicate(timeout=280)[1].decode()[-3000:] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def check_gradients(results, case):
    """Of the last step."""
    want: dict[str, torch.Tensor] = {}
    for rank in range(WORLD):
        batch = worker.batch(rank, worker.STEPS[case] - 1)
        chosen = Picks(*results[rank][case]["picks"])
        for name, grad in hf_reference(worker.build(), batch, chosen).grads.items():
            want[name] = want.get(name, 0) + grad / WORLD
    size = sum(float(grad.double().square().sum()) for grad in want.values()) ** 0.5
    for rank in range(WORLD):
        found = results[rank][case]
        assert found["metrics"]["matched"] and found["graphs"] == 1
        off = sum(float((found["grads"][name] - grad).double().square().sum()) for name, grad in want.items()) ** 0.5
        assert off < 1e-4 * size, case
    assert not torch.equal(results[0][case]["picks"][0], results[1][case]["picks"][0])


def check_decisions(results, case):
    first, second = results[0][case], results[1][case]
    assert not first["alone"] and not second["alone"]
    assert first["added"] == second["added"] and first["added"][-1] is not None
    assert first["ratios"] == second["ratios"]


@pytest.mark.parametrize("case", worker.STEPS)
def test_gradients_are_the_mean_of_the_ranks(results, case):
    check_gradients(results, case)


@pytest.mark.parametrize("case", worker.MEASURED)
def test_the_ratio_is_decided_by_what_all_ranks_have_measured(results, case):
    check_decisions(results, case)
