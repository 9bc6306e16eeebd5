"""Two processes whose parameters are spread by ``cggr_compile.distributed.shard``, the step one graph."""

from __future__ import annotations

import pytest
import shard_cases as cases
import torch
import torch.distributed.checkpoint as checkpoint
from ddp_cases import WORLD, build
from ranks import as_near_as_bfloat16, averaged, same
from reference import Picks, backward, hf_reference

from cggr_compile.passes.joint.reshard_after_forward import ReshardAfterForward


@pytest.mark.parametrize(
    ("case", "make", "numbers"),
    [
        ("shard, saved", build, (0, 1)),
        ("shard, tied", cases.tied, (0,)),
        pytest.param("shard, kept", build, (0,), marks=pytest.mark.slow),
        pytest.param("shard, of copies", build, (0,), marks=pytest.mark.slow),
        pytest.param("shard, two axes", build, (0,), marks=pytest.mark.slow),
        pytest.param("shard, verified", build, (0,), marks=pytest.mark.slow),
        pytest.param("shard, Inductor", cases.tied, (0,), marks=pytest.mark.slow),
    ],
)
def test_gradients_are_the_mean_of_the_ranks(request, case, make, numbers):
    found = request.getfixturevalue("slow_results" if case in cases.SLOW else "results")[case]
    want = averaged(found, numbers, make=make)
    for one in found:
        assert one["sharded"] and one["metrics"]["matched"] and one["one runtime"]
        assert one["metrics"]["step"] == len(numbers)
        same(one["grads"], want)


def test_adapters_are_trained_and_what_is_frozen_is_spread(results):
    found = results["shard, adapted"]
    want: dict[str, torch.Tensor] = {}
    for rank in range(WORLD):
        model = cases.Adapted()
        picks = Picks(*found[rank]["picks"][0])
        for name, grad in hf_reference(model, cases.batch(rank), picks).grads.items():
            want[name] = want.get(name, 0) + grad / WORLD
    assert set(want) == {name for name, p in cases.Adapted().named_parameters() if p.requires_grad}
    for one in found:
        assert one["metrics"]["matched"] and len(one["frozen"]) > 5 and all(one["frozen"])
        same(one["grads"], want)


def test_each_process_has_its_part(results):
    rows = [one["rows"] for one in results["shard, saved"]]
    whole = {name: len(p) for name, p in build().named_parameters()}
    assert {name: sum(one[name] for one in rows) for name in whole} == whole
    assert max(abs(rows[0][name] - rows[1][name]) for name in whole) <= 1


def test_clipped_by_the_norm_of_all(results):
    want = averaged(results["shard, saved"], (0, 1))
    norm = sum(float(grad.square().sum()) for grad in want.values()) ** 0.5
    for one in results["shard, saved"]:
        assert abs(one["norm"] - norm) < 1e-5 * norm


def test_checkpoints_are_those_of_the_plain_model(results):
    """Of the same names, and loaded without ``shard``, by one process."""
    plain, first = build(), results["shard, saved"][0]
    begun = {name: p.clone() for name, p in plain.state_dict().items()}
    state = {"model": plain.state_dict()}
    checkpoint.load(state, checkpoint_id=results.folder / "shards", no_dist=True)
    plain.load_state_dict(state["model"])
    for one in results["shard, saved"]:
        assert one["names"] and one["again"].pop("begun") == 0.0
        for name, p in plain.named_parameters():
            assert torch.equal(one["again"][name], p) and not torch.equal(begun[name], p)
    assert set(first["whole"]) == set(begun)
    for name, p in plain.state_dict().items():
        assert torch.equal(first["whole"][name], p)


@pytest.mark.parametrize(
    "case",
    [
        "shard, uncompiled",
        "shard, every token",
        pytest.param("shard, another backend", marks=pytest.mark.slow),
    ],
)
def test_on_every_token(request, case):
    found = request.getfixturevalue("slow_results" if case in cases.SLOW else "results")[case]
    want: dict[str, torch.Tensor] = {}
    for rank in range(WORLD):
        model = build()
        for name, grad in backward(model, model(**cases.batch(rank)).loss).grads.items():
            want[name] = want.get(name, 0) + grad / WORLD
    for one in found:
        same(one["grads"], want)
        assert one.get("passes", {}).get(ReshardAfterForward.name, True)


@pytest.mark.slow
def test_mixed_precision(slow_results):
    found = slow_results["shard, mixed precision"]
    as_near_as_bfloat16(found)
    for one in found:
        assert all(grad.dtype == torch.float32 for grad in one["grads"].values())


@pytest.mark.slow
def test_verified(slow_results):
    for one in slow_results["shard, verified"]:
        assert one["metrics"]["verify_steps"] == 1 and one["metrics"]["verify_max_error"] < 1e-4
