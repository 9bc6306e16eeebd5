"""What test_distributed.py runs in each of its processes: ``python nccl_worker.py RANK WORLD FOLDER DEVICE``.

DEVICE is cuda, with NCCL and Inductor; or cpu, with gloo and without, to rehearse the cases. Written to
``FOLDER/RANK.pt`` is what they have computed, on the CPU.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import cggr_compile
from cggr_compile.shared_readback import LAG

OPTIONS = {"min_tokens_ratio": 0.25, "scoring": "random", "selection": "random", "launch_bound": "select"}
STEPS = {"ddp": 1, "ddp, wrapped first": 1, "ddp, CUDA graphs": 4, "fsdp": 1, "fsdp, resharded": 1}
MEASURED = ("ddp, measured", "fsdp, measured")
CASES = (*STEPS, *MEASURED)
BUCKET = 4096 / 2**20  # MB: several


def batch(rank: int, number: int) -> dict[str, torch.Tensor]:
    return models.make_batch(4, 64, seed=10 * rank + number)


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.family("llama")


def run(case: str, rank: int, device: str) -> dict[str, Any]:
    options = {**OPTIONS, "compiler": "inductor" if device == "cuda" else "eager"}
    options |= {"cuda_graphs": True} if "CUDA graphs" in case else {}
    options |= {"min_tokens_ratio": "auto", "measure_every": 2, "variance_bound": 1.0} if case in MEASURED else {}
    torch._dynamo.reset()
    model = called = build().to(device)
    if case.startswith("fsdp"):
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        fully_shard(model, mesh=mesh, reshard_after_forward="resharded" in case)
    if "wrapped first" not in case:
        models.compiled(model, **options)
    if case.startswith("ddp"):
        called = DistributedDataParallel(model, bucket_cap_mb=BUCKET)
    if "wrapped first" in case:
        called = models.compiled(called, in_place=False, **options)
    runtime = cggr_compile.runtime(model)
    ratios, added = [], []
    for number in range(STEPS.get(case, 3 * LAG + 4)):
        model.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        called(**{name: value.to(device) for name, value in batch(rank, number).items()}).loss.backward()
        ratios.append(runtime.metrics()["ratio"])
        added.append(runtime.metrics()["added_variance"])
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        "grads": {name: (g.full_tensor() if isinstance(g, DTensor) else g).cpu() for name, g in grads.items()},
        "picks": None if runtime.selected is None else (runtime.selected.cpu(), runtime.weights.cpu()),
        "metrics": runtime.metrics(),
        "graphs": len(runtime.reports),
        "alone": runtime.agreement is not None and runtime.agreement.alone,
        "ratios": ratios,
        "added": added,
    }


def main() -> None:
    rank, world, folder, device = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    dist._DEFAULT_FIRST_BUCKET_BYTES = 4096
    torch.save({case: run(case, rank, device) for case in CASES}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
