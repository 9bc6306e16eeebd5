"""Two processes under FSDP2, sharded at the root: the averaged gradients of what each of them has selected."""

from __future__ import annotations

import fsdp_cases as cases
import models
import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from ddp_cases import WORLD, build
from ranks import as_near_as_bfloat16, averaged, same
from reference import backward, hf_reference

import cggr_compile


@pytest.mark.parametrize(
    ("case", "numbers"),
    [
        ("root", (0,)),
        ("root, resharded, other shapes", (0, 1)),
        pytest.param("root, offloaded", (0,), marks=pytest.mark.slow),
        pytest.param("root, verified", (0,), marks=pytest.mark.slow),
    ],
)
def test_gradients_are_the_mean_of_the_ranks(request, case, numbers):
    found = request.getfixturevalue("slow_results" if case in cases.SLOW else "results")[case]
    want = averaged(found, numbers)
    for rank in range(WORLD):
        one = found[rank]
        assert one["sharded"] and one["metrics"]["matched"]
        assert one["one runtime"] and one["metrics"]["step"] == len(numbers), "runtime(model) finds it"
        same(one["grads"], want)


def test_shapes_of_one_rank_are_compiled_there(results):
    found = results["root, resharded, other shapes"]
    assert [one["graphs"] for one in found] == [1, 2]


@pytest.mark.slow
def test_mixed_precision(slow_results):
    as_near_as_bfloat16(slow_results["root, mixed precision"])


@pytest.mark.slow
def test_gradients_are_clipped(slow_results):
    found = slow_results["root, clipped and saved"]
    want = averaged(found)
    norm = sum(float(grad.square().sum()) for grad in want.values()) ** 0.5
    for one in found:
        assert abs(one["norm"] - norm) < 1e-5 * norm and norm > cases.CLIP
        same(one["clipped"], {name: grad * (cases.CLIP / norm) for name, grad in want.items()})


@pytest.mark.slow
def test_a_distributed_checkpoint_resumes(slow_results):
    for one in slow_results["root, clipped and saved"]:
        assert torch.equal(one["on"]["picks"][0].rows, one["resumed"]["picks"][0].rows)
        assert not torch.equal(one["on"]["picks"][0].rows, one["picks"][0].rows)
        same(one["resumed"]["grads"], one["on"]["grads"])


@pytest.mark.slow
def test_and_one_process_resumes_it(slow_results):
    """It selects what rank 0 does, with the same parameters."""
    model = models.compiled(build(), **cases.OPTIONS)
    runtime = cggr_compile.runtime(model)
    state = {"model": model.state_dict(), "cggr": runtime.state_dict()}
    checkpoint.load(state, checkpoint_id=slow_results.folder / "checkpoint", no_dist=True)
    model.load_state_dict(state["model"])
    runtime.load_state_dict(state["cggr"])
    got = backward(model, model(**cases.batch(0, 2)).loss)
    on = slow_results["root, clipped and saved"]
    assert torch.equal(runtime.selected, on[0]["on"]["picks"][0].rows)
    other = build()
    other.load_state_dict(state["model"])
    rest = hf_reference(other, cases.batch(1, 2), on[1]["on"]["picks"][0])
    same(on[0]["on"]["grads"], {name: (grad + rest.grads[name]) / 2 for name, grad in got.grads.items()})


@pytest.mark.slow
def test_the_ratio_is_decided_by_what_all_ranks_have_measured(slow_results):
    first, second = slow_results["root, measured"]
    assert first == second and first["added"] is not None


@pytest.mark.slow
def test_a_failed_verification_raises_on_all_ranks(slow_results):
    first, second = (one["error"] for one in slow_results["root, verification fails"])
    assert first.startswith("on rank 1: the row-sparse") and second.startswith("the row-sparse")


def test_per_block_it_is_dense_and_says_what_helps(results):
    want: dict[str, torch.Tensor] = {}
    for rank in range(WORLD):
        model = build()
        for name, grad in backward(model, model(**cases.batch(rank)).loss).grads.items():
            want[name] = want.get(name, 0) + grad / WORLD
    for one in results["per block"]:
        same(one["grads"], want)
        (warned,) = one["warned"]
        assert "FSDP wraps 1 modules inside of the model" in warned and "wrap the root only" in warned
        assert "cggr_compile.distributed.shard(model, mesh)" in warned
