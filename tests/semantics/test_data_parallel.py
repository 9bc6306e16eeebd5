"""Two processes under DistributedDataParallel: the averaged gradients of what each of them has selected."""

from __future__ import annotations

import ddp_cases as worker
import models
import pytest
import torch
from ddp_cases import WORLD
from reference import Picks, Run, assert_same, backward, hf_reference

import cggr_compile
from cggr_compile.data_parallel import seed_of_rank


def cases(*others):
    """All but these; some are slow."""
    chosen = [case for case in worker.CASES if case not in others]
    return models.slow_but([case for case in chosen if case not in worker.SLOW], chosen)


@pytest.fixture
def found(request, case):
    """By rank, of a case that may be slow."""
    return request.getfixturevalue("slow_results" if case in worker.SLOW else "results")[case]


def averaged(case, found) -> Run:
    """The mean over the ranks: gradients of an unmodified, uncompiled model at the positions that each has selected."""
    options = {**worker.OPTIONS, **worker.CASES[case][0]}
    mode = {name: options[name] for name in ("gradient", "kv_gradient") if name in options}
    total: dict[str, torch.Tensor] = {}
    for rank in range(WORLD):
        for number, chosen in enumerate(found[rank]["picks"] or [None]):
            model, batch = worker.build(), worker.batch(case, rank, number)
            run = backward(model, model(**batch).loss) if chosen is None else hf_reference(model, batch, chosen, **mode)
            for name, grad in run.grads.items():
                total[name] = total.get(name, 0) + grad / WORLD
    return Run(torch.zeros(()), total)


@pytest.mark.parametrize("case", cases("no labels on one rank", "counted over all ranks"))
def test_gradients_are_the_mean_of_the_ranks(found, case):
    want = averaged(case, found)
    for rank in range(WORLD):
        assert_same(Run(torch.zeros(()), found[rank]["grads"]), want)


@pytest.mark.parametrize("case", cases("not rewritten", "uneven last batch"))
def test_a_step_is_one_graph_and_nothing_has_to_be_set(found, case):
    for rank in range(WORLD):
        assert found[rank]["metrics"]["matched"] and found[rank]["graphs"] == 1 and not found[rank]["warned"], found


def test_ranks_draw_positions_of_their_own(results):
    def rows(case):
        return [results[case][rank]["picks"][0].rows for rank in range(WORLD)]

    first, second = rows("one seed")
    alone = rows("compiled, then wrapped")
    assert torch.equal(first, alone[0]), "rank 0 draws what a process alone would"
    assert not torch.equal(*alone)
    assert (first == second).float().mean() > (alone[0] == alone[1]).float().mean()
    assert len({seed_of_rank(seed) for seed in range(5)}) == 5


def test_a_rank_without_labels_counts_as_zero(results):
    case = "no labels on one rank"
    model, batch = worker.build(), worker.batch(case, 0)
    want = hf_reference(model, batch, Picks(*results[case][0]["picks"][0]))
    for rank in range(WORLD):
        halves = {name: grad * WORLD for name, grad in results[case][rank]["grads"].items()}
        assert_same(Run(torch.zeros(()), halves), Run(torch.zeros(()), want.grads))
    assert results[case][1]["metrics"]["tokens_total"] == 0


@pytest.mark.slow
def test_what_is_not_rewritten_is_cut_as_ever(slow_results):
    """Dynamo's pieces, so that reductions overlap, and the cause is that of the whole graph."""
    for rank in range(WORLD):
        found = slow_results["not rewritten"][rank]
        assert found["graphs"] > 2 and "min_tokens_ratio is 1.0" in found["metrics"]["fallback_reason"]
        assert not found["warned"]


@pytest.mark.slow
def test_a_batch_of_another_shape_is_compiled_where_it_is(slow_results):
    found = [slow_results["uneven last batch"][rank] for rank in range(WORLD)]
    assert [one["graphs"] for one in found] == [1, 2] and all(one["metrics"]["matched"] for one in found)


def test_counted_over_all_ranks_it_is_the_gradient_of_one_batch(results):
    """Transformers' average_tokens_across_devices: each rank's sum, over the labels of all, times the ranks."""
    case = "counted over all ranks"
    model, batches = worker.build(), [worker.batch(case, rank) for rank in range(WORLD)]
    chosen = [results[case][rank]["picks"][0] for rank in range(WORLD)]
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "labels")}
    picks = Picks(*(torch.cat(parts) for parts in zip(*chosen, strict=True)))
    want = hf_reference(model, {**whole, "num_items_in_batch": batches[0]["num_items_in_batch"]}, picks)
    for rank in range(WORLD):
        assert_same(Run(torch.zeros(()), results[case][rank]["grads"]), Run(torch.zeros(()), want.grads))


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_state_resumes_on_another_number_of_ranks(results, rank):
    """It holds the seed that was given: what the rank adds is added again, by the rank that loads it."""
    state = results["two batches"][rank]["states"][1]
    assert state == results["two batches"][1 - rank]["states"][1] and state["seed"] == 0 and state["step"] == 1
    model = worker.build()
    models.compiled(model, **worker.OPTIONS)
    runtime = cggr_compile.runtime(model)
    runtime.load_state_dict(state)
    model(**worker.batch("two batches", 0, 1)).loss.backward()
    assert torch.equal(runtime.selected, results["two batches"][0]["picks"][1].rows), "rank 0's of one process"


@pytest.mark.slow
def test_it_was_verified(slow_results):
    assert all(slow_results["verified"][rank]["metrics"]["verify_steps"] == 1 for rank in range(WORLD))
