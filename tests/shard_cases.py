"""What test_shard.py looks at: two processes with ``cggr_compile.distributed.shard``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed.checkpoint as checkpoint
from ddp_cases import WORLD, build
from fsdp_cases import CLIP, HALF, OPTIONS, batch, full, steps
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import cggr_compile
from cggr_compile.distributed import as_stored, shard

EMBEDDING = 3  # an odd number of rows: the last process has fewer


def sharded(model: Any, dimensions: tuple[int, ...] = (WORLD,), **arguments: Any) -> Any:
    names = ("replicate", "shard")[-len(dimensions) :]
    return shard(model, init_device_mesh("cpu", dimensions, mesh_dim_names=names), **arguments)


class Adapted(nn.Module):
    """A frozen model whose head is tied to its embedding and has an adapter, and a number that scales its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.base = build()
        self.base.lm_head.weight = self.base.wte.weight
        self.base.requires_grad_(False)
        torch.manual_seed(1)
        self.down, self.up = nn.Linear(models.HIDDEN, EMBEDDING, bias=False), nn.Linear(EMBEDDING, models.HIDDEN)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.base.ln_f = nn.Sequential(self.base.ln_f, _Added(self.down, self.up, self.scale))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)


class _Added(nn.Module):
    def __init__(self, down: nn.Module, up: nn.Module, scale: nn.Parameter) -> None:
        super().__init__()
        self.down, self.up, self.scale = down, up, scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.up(self.down(hidden)) * self.scale


def tied() -> nn.Module:
    model = build()
    model.lm_head.weight = model.wte.weight
    return model


def compiled(rank: int, make: Callable[[], Any] = build, numbers: tuple[int, ...] = (0,), **arguments: Any) -> Any:
    options = arguments.pop("options", OPTIONS)
    model = sharded(make(), **arguments)
    model.compile(backend=models.backend(), options=options)
    if make is Adapted:
        return adapted(model, rank)
    return steps(model, model, rank, numbers)


def adapted(model: Any, rank: int) -> dict[str, Any]:
    model(**batch(rank)).loss.backward()
    runtime = cggr_compile.runtime(model)
    return {
        "grads": {n: full(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None},
        "frozen": [isinstance(p, DTensor) for p in model.parameters() if not p.requires_grad],
        "metrics": runtime.metrics(),
        "picks": [(runtime.selected.clone(), runtime.weights.clone())],
    }


def trained_and_saved(rank: int, folder: Path) -> dict[str, Any]:
    """Two steps, the second one with other shapes in one process; clipped, an optimizer's step, and saved."""
    plain = build()
    names = list(plain.state_dict())
    model = sharded(plain)
    model.compile(backend=models.backend(), options=OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    found = steps(model, model, rank, (0, 1))
    found["norm"] = float(full(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
    optimizer.step()
    checkpoint.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {
        **found,
        "names": list(model.state_dict()) == names,
        "rows": {name: p.to_local().shape[0] for name, p in model.named_parameters()},
        "whole": {name: value.clone() for name, value in whole.items()},
        "again": _resumed(rank, folder),
    }


def _resumed(rank: int, folder: Path) -> dict[str, Any]:
    """Parameters of a model that begins on the meta device, after loading what was saved."""
    with torch.device("meta"):
        model = build()
    sharded(model).to_empty(device="cpu")
    with as_stored():
        nn.init.zeros_(model.lm_head.weight)
    begun = float(full(model.state_dict()["lm_head.weight"]).abs().max())
    state = {"model": model.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    return {"begun": begun, **{name: full(p.detach()).clone() for name, p in model.named_parameters()}}


def plainly(rank: int, backend: str | None) -> dict[str, Any]:
    """Without this project's backend."""
    model = sharded(build())
    call = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    call(**batch(rank)).loss.backward()
    return {"grads": {name: full(p.grad).clone() for name, p in model.named_parameters()}}


def every_token(rank: int) -> dict[str, Any]:
    model = sharded(build())
    model.compile(backend=models.backend(), options={**OPTIONS, "min_tokens_ratio": 1.0})
    model(**batch(rank)).loss.backward()
    (report,) = cggr_compile.runtime(model).reports
    return {
        "grads": {name: full(p.grad).clone() for name, p in model.named_parameters()},
        "passes": {record.name: record.matched for record in report.passes},
    }


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "shard, saved": trained_and_saved,
    "shard, tied": lambda rank: compiled(rank, tied),
    "shard, adapted": lambda rank: compiled(rank, Adapted),
    "shard, uncompiled": lambda rank: plainly(rank, None),
    "shard, every token": every_token,
    "shard, another backend": lambda rank: plainly(rank, "aot_eager"),
    "shard, kept": lambda rank: compiled(rank, reshard_after_forward=False),
    "shard, mixed precision": lambda rank: compiled(rank, mp_policy=HALF),
    "shard, of copies": lambda rank: compiled(rank, dimensions=(WORLD, 1)),
    "shard, two axes": lambda rank: compiled(rank, dimensions=(1, WORLD)),
    "shard, verified": lambda rank: compiled(rank, options={**OPTIONS, "verify": True}),
    "shard, Inductor": lambda rank: compiled(rank, tied, options={**OPTIONS, "compiler": "inductor"}),
}
SLOW = (
    *("shard, another backend", "shard, kept", "shard, mixed precision", "shard, of copies", "shard, two axes"),
    *("shard, verified", "shard, Inductor"),
)


def run(case: str, rank: int, folder: Path) -> dict[str, Any]:
    return CASES[case](rank, folder / "shards") if CASES[case] is trained_and_saved else CASES[case](rank)
