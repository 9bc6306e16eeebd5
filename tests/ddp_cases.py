"""What test_data_parallel.py compares, run in every process by distributed_worker.py.

Every case is a model under DistributedDataParallel with buckets so small that Dynamo cuts the graph at each. Written is
what a case has computed: gradients, the selection, what the runtime says.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import models
import torch
from torch.nn.parallel import DistributedDataParallel
from training import picks

import cggr_compile

OPTIONS = {"compiler": "eager", "min_tokens_ratio": 0.25, "scoring": "random", "selection": "random"}
BUCKET = 4096  # bytes
WORLD = 2
# name -> options, when the model is compiled, arguments of DistributedDataParallel
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "compiled, then wrapped": ({}, "before", {}),
    "wrapped, then compiled": ({}, "after", {"gradient_as_bucket_view": True}),
    "wrapped, compiled in place": ({"gradient": "exact"}, "in place", {"find_unused_parameters": True}),
    "static graph": ({"kv_gradient": "stop"}, "before", {"static_graph": True}),
    "one seed": ({"seed_per_rank": False}, "before", {}),
    "two batches": ({}, "before", {}),
    "uneven last batch": ({}, "before", {}),
    "counted over all ranks": ({}, "after", {}),
    "no labels on one rank": ({"selection": "labels", "context": 0}, "before", {}),
    "not rewritten": ({"min_tokens_ratio": 1.0}, "before", {}),
    "verified": ({"verify": True}, "before", {}),
}
# what make test leaves out
SLOW = ("static graph", "not rewritten", "uneven last batch", "verified")


def batch(case: str, rank: int, number: int = 0) -> dict[str, torch.Tensor]:
    """Of one rank; every one has another number of labels."""
    other = case == "uneven last batch" and rank and number
    data = models.make_batch(*((1, 12) if other else ()), seed=10 * rank + number)
    labels = data["input_ids"].clone()
    labels[:, : 3 + 4 * rank] = models.IGNORE
    if case == "no labels on one rank" and rank:
        labels[:] = models.IGNORE
    found = {"input_ids": data["input_ids"], "labels": labels}
    if case == "counted over all ranks":
        found["num_items_in_batch"] = torch.tensor(sum(models.SEQ - 3 - 4 * rank for rank in range(WORLD)) * 2)
    return found


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.PlainLM()


def run(case: str, rank: int, _folder: Path) -> dict[str, Any]:
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
    chosen, states = [], []
    numbers = 2 if case in ("two batches", "uneven last batch") else 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(numbers):
            states.append(cggr_compile.runtime(model).state_dict())
            with wrapped.no_sync() if number < numbers - 1 else torch.enable_grad():
                loss = wrapped(**batch(case, rank, number)).loss
                (loss * WORLD if case == "counted over all ranks" else loss).backward()
            if cggr_compile.runtime(model).selected is not None:
                chosen.append(picks(model))
    return {
        "grads": {name: p.grad.clone() for name, p in model.named_parameters()},
        "picks": chosen,
        "states": states,
        "metrics": cggr_compile.runtime(wrapped).metrics(),
        "graphs": len(cggr_compile.runtime(model).reports),
        "warned": [str(w.message) for w in caught if "cggr" in str(w.message)],
    }
