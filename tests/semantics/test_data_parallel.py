"""Two processes under DistributedDataParallel: the averaged gradients of what each of them has selected."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from reference import Picks, Run, assert_same, backward, hf_reference

from cggr_compile.data_parallel import seed_of_rank

WORLD = 2
TESTS = Path(worker.__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By rank and case; the processes run every case one after the other."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(Path(worker.__file__))]
    processes = [
        subprocess.Popen([*command, str(rank), str(WORLD), str(folder)], env=environment, stderr=subprocess.PIPE)
        for rank in range(WORLD)
    ]
    try:
        errors = [process.communicate(timeout=240)[1].decode()[-3000:] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def averaged(case, results) -> Run:
    """The mean over the ranks: gradients of an unmodified, uncompiled model at the positions that each has selected."""
    options = {**worker.OPTIONS, **worker.CASES[case][0]}
    mode = {name: options[name] for name in ("gradient", "kv_gradient") if name in options}
    total: dict[str, torch.Tensor] = {}
    for rank in range(WORLD):
        for number, chosen in enumerate(results[rank][case]["picks"] or [None]):
            model, batch = worker.build(), worker.batch(case, rank, number)
            run = backward(model, model(**batch).loss) if chosen is None else hf_reference(model, batch, chosen, **mode)
            for name, grad in run.grads.items():
                total[name] = total.get(name, 0) + grad / WORLD
    return Run(torch.zeros(()), total)


@pytest.mark.parametrize("case", [case for case in worker.CASES if case != "no labels on one rank"])
def test_gradients_are_the_mean_of_the_ranks(results, case):
    want = averaged(case, results)
    for rank in range(WORLD):
        assert_same(Run(torch.zeros(()), results[rank][case]["grads"]), want)


@pytest.mark.parametrize("case", [case for case in worker.CASES if case != "not rewritten"])
def test_a_step_is_one_graph_and_nothing_has_to_be_set(results, case):
    for rank in range(WORLD):
        found = results[rank][case]
        assert found["metrics"]["matched"] and found["graphs"] == 1 and not found["warned"], found


def test_ranks_draw_positions_of_their_own(results):
    def rows(case):
        return [results[rank][case]["picks"][0].rows for rank in range(WORLD)]

    first, second = rows("one seed")
    alone = rows("compiled, then wrapped")
    assert torch.equal(first, alone[0]), "rank 0 draws what a process alone would"
    assert not torch.equal(*alone)
    assert (first == second).float().mean() > (alone[0] == alone[1]).float().mean()
    assert len({seed_of_rank(seed) for seed in range(5)}) == 5


def test_a_rank_without_labels_counts_as_zero(results):
    case = "no labels on one rank"
    model, batch = worker.build(), worker.batch(case, 0)
    want = hf_reference(model, batch, Picks(*results[0][case]["picks"][0]))
    for rank in range(WORLD):
        halves = {name: grad * WORLD for name, grad in results[rank][case]["grads"].items()}
        assert_same(Run(torch.zeros(()), halves), Run(torch.zeros(()), want.grads))
    assert results[1][case]["metrics"]["tokens_total"] == 0


def test_what_is_not_rewritten_is_cut_as_ever(results):
    """Dynamo's pieces, so that reductions overlap, and the cause is that of the whole graph."""
    for rank in range(WORLD):
        found = results[rank]["not rewritten"]
        assert found["graphs"] > 2 and "min_tokens_ratio is 1.0" in found["metrics"]["fallback_reason"]
        assert not found["warned"]


def test_it_was_verified(results):
    assert all(results[rank]["verified"]["metrics"]["verify_steps"] == 1 for rank in range(WORLD))
