"""What test_data_parallel.py runs in each of its processes: ``python distributed_worker.py RANK WORLD FOLDER``.

Every case is a model under DistributedDataParallel with buckets so small that Dynamo cuts the graph at each. Written is
what a case has computed: gradients, the selection, what the runtime says.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import picks

import cggr_compile

OPTIONS = {"compiler": "eager", "min_tokens_ratio": 0.25, "scoring": "random", "selection": "random"}
BUCKET = 4096  # bytes
# name -> options, when the model is compiled, arguments of DistributedDataParallel
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "compiled, then wrapped": ({}, "before", {}),
    "wrapped, then compiled": ({}, "after", {"gradient_as_bucket_view": True}),
    "wrapped, compiled in place": ({"gradient": "exact"}, "in place", {"find_unused_parameters": True}),
    "static graph": ({"kv_gradient": "stop"}, "before", {"static_graph": True}),
    "one seed": ({"seed_per_rank": False}, "before", {}),
    "two batches": ({}, "before", {}),
    "no labels on one rank": ({"selection": "labels", "context": 0}, "before", {}),
    "not rewritten": ({"min_tokens_ratio": 1.0}, "before", {}),
    "verified": ({"verify": True}, "before", {}),
}


def batch(case: str, rank: int, number: int = 0) -> dict[str, torch.Tensor]:
    """Of one rank; every one has another number of labels."""
    data = models.make_batch(seed=10 * rank + number)
    labels = data["input_ids"].clone()
    labels[:, : 3 + 4 * rank] = models.IGNORE
    if case == "no labels on one rank" and rank:
        labels[:] = models.IGNORE
    return {"input_ids": data["input_ids"], "labels": labels}


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.PlainLM()


def run(case: str, rank: int) -> dict[str, Any]:
    options, when, arguments = CASES[case]
    options = {**OPTIONS, **options}
    torch._dynamo.reset()
    model = build()
    if when == "before":
        model.compile(backend="cggr", options=options)
    wrapped: Any = DistributedDataParallel(model, bucket_cap_mb=BUCKET / 2**20, **arguments)
    if when == "after":
        wrapped = torch.compile(wrapped, backend="cggr", options=options)
    elif when == "in place":
        wrapped.compile(backend="cggr", options=options)
    chosen = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(2 if case == "two batches" else 1):
            with wrapped.no_sync() if case == "two batches" and not number else torch.enable_grad():
                wrapped(**batch(case, rank, number)).loss.backward()
            if cggr_compile.runtime(model).selected is not None:
                chosen.append(picks(model))
    return {
        "grads": {name: p.grad.clone() for name, p in model.named_parameters()},
        "picks": chosen,
        "metrics": cggr_compile.runtime(wrapped).metrics(),
        "graphs": len(cggr_compile.runtime(model).reports),
        "warned": [str(w.message) for w in caught if "cggr" in str(w.message)],
    }


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    dist._DEFAULT_FIRST_BUCKET_BYTES = BUCKET
    torch.save({case: run(case, rank) for case in CASES}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
