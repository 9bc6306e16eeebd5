"""What test_fsdp.py looks at: two processes under FSDP2, ``fully_shard`` at the root and per block."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import models
import torch
import torch.distributed.checkpoint as checkpoint
from ddp_cases import WORLD, build
from decision_cases import MEASURED
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from training import picks

import cggr_compile
from cggr_compile.shared_readback import LAG
from cggr_compile.verify import VerificationError, Verifier

OPTIONS = {"compiler": "eager", "min_tokens_ratio": 0.25, "scoring": "random", "selection": "random"}
CLIP = 0.01


def batch(rank: int, number: int = 0) -> dict[str, torch.Tensor]:
    """Of another length in one process's second step."""
    length = 12 if rank and number == 1 else models.SEQ
    data = models.make_batch(seq=length, seed=10 * rank + number)
    return {"input_ids": data["input_ids"], "labels": data["input_ids"].clone()}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(dimensions: tuple[int, ...] = (WORLD,), **policies: Any) -> Any:
    names = ("replicate", "shard")[-len(dimensions) :]
    model = build()
    fully_shard(model, mesh=init_device_mesh("cpu", dimensions, mesh_dim_names=names), **policies)
    return model


def steps(model: Any, call: Any, rank: int, numbers: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Gradients of all steps, summed up; what was picked in each."""
    runtime = cggr_compile.runtime(model)
    chosen = []
    for number in numbers:
        call(**batch(rank, number)).loss.backward()
        chosen.append(picks(model))
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        "picks": chosen,
        "grads": {name: full(grad).clone() for name, grad in grads.items()},
        "sharded": all(isinstance(grad, DTensor) for grad in grads.values()),
        "metrics": runtime.metrics(),
        "one runtime": cggr_compile.runtime(call) is runtime and cggr_compile.runtime(model.blocks[0]) is runtime,
        "graphs": len(runtime.reports),
    }


def compiled(rank: int, numbers: tuple[int, ...] = (0,), *, in_place: bool, **arguments: Any) -> dict[str, Any]:
    model = sharded(**arguments)
    return steps(model, models.compiled(model, in_place=in_place, **OPTIONS), rank, numbers)


def clipped_and_saved(rank: int, folder: Path) -> dict[str, Any]:
    """Trains, clips, saves, trains on; a second model resumes and does the last step again."""
    model = models.compiled(sharded(), **OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    found = steps(model, model, rank)
    found["norm"] = float(full(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
    found["clipped"] = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
    optimizer.step()
    optimizer.zero_grad()
    checkpoint.save(
        {"model": model.state_dict(), "cggr": cggr_compile.runtime(model).state_dict()}, checkpoint_id=folder
    )
    found["on"] = steps(model, model, rank, (2,))
    resumed = models.compiled(sharded(), **OPTIONS)
    state = {"model": resumed.state_dict(), "cggr": cggr_compile.runtime(resumed).state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    resumed.load_state_dict(state["model"])
    cggr_compile.runtime(resumed).load_state_dict(state["cggr"])
    return {**found, "resumed": steps(resumed, resumed, rank, (2,))}


def per_block(rank: int) -> dict[str, Any]:
    """As most people do it."""
    model = build()
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.compile(backend="cggr", options=OPTIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**batch(rank)).loss.backward()
    return {
        "grads": {name: full(parameter.grad).clone() for name, parameter in model.named_parameters()},
        "warned": [str(w.message) for w in caught if "cggr" in str(w.message)],
    }


def measured(rank: int) -> dict[str, Any]:
    model = models.compiled(sharded(), **MEASURED)
    runtime = cggr_compile.runtime(model)
    for number in range(3 * LAG + 4):
        model(**models.make_batch(seed=10 * rank + number)).loss.backward()
        model.zero_grad()
    return {"added": runtime.metrics()["added_variance"], "ratio": runtime.metrics()["ratio"]}


def fails(rank: int) -> dict[str, Any]:
    model = models.compiled(sharded(), **OPTIONS, verify=True)
    compare = mock.patch.object(Verifier, "compare", lambda *_: (1.0 if rank else 0.0, "a weight"))
    with compare:
        try:
            model(**batch(rank)).loss.backward()
        except VerificationError as error:
            return {"error": str(error)}
    return {"error": ""}


def verified(rank: int) -> dict[str, Any]:
    model = models.compiled(sharded(reshard_after_forward=True), **OPTIONS, verify=True)
    return steps(model, model, rank)


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "root": lambda rank: compiled(rank, in_place=True),
    "root, resharded, other shapes": lambda rank: compiled(
        rank, (0, 1), in_place=False, reshard_after_forward=True, dimensions=(1, WORLD)
    ),
    "root, mixed precision": lambda rank: compiled(rank, in_place=True, mp_policy=HALF),
    "root, offloaded": lambda rank: compiled(
        rank, in_place=True, offload_policy=CPUOffloadPolicy(pin_memory=False), reshard_after_forward=False
    ),
    "root, clipped and saved": clipped_and_saved,
    "root, verified": verified,
    "root, verification fails": fails,
    "root, measured": measured,
    "per block": per_block,
}
SLOW = (
    *("root, mixed precision", "root, offloaded", "root, measured"),
    *("root, verified", "root, verification fails", "root, clipped and saved"),
)


def run(case: str, rank: int, folder: Path) -> dict[str, Any]:
    return clipped_and_saved(rank, folder / "checkpoint") if CASES[case] is clipped_and_saved else CASES[case](rank)
