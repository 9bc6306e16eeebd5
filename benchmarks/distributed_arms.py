"""The ways of spreading one training step over several processes that distributed.py compares.

alone-dense        no other process: what scaling is measured against. Causal attention without a mask tensor.
alone              the same with ``backend="cggr"``.
ddp-dense          ``torch.compile(DistributedDataParallel(model))``, as users do: DDPOptimizer cuts the graph at
                   gradient buckets, whose reductions overlap with the backward pass.
ddp                the same with ``backend="cggr"``, which asks for the whole graph.
fsdp-dense         ``fully_shard`` at the root, the whole model compiled.
fsdp               the same with ``backend="cggr"``.
fsdp-blocks-dense  ``fully_shard`` for every block and the root, every block compiled by itself (torchtitan's way).

Every arm has a model and an optimizer of its own: what is wrapped cannot be unwrapped. And a backend of its own: Dynamo
would run what it has captured without DistributedDataParallel, uncut, for a model under it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from arms import MASKLESS, Step, dense_compiler, loss_of
from shapes import Shape, build_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cggr_compile.backend import cggr

DENSE = ("alone-dense", "ddp-dense", "fsdp-dense", "fsdp-blocks-dense")
SELECTIVE = ("alone", "ddp", "fsdp")
ARMS = ("alone-dense", "alone", "ddp-dense", "ddp", "fsdp-dense", "fsdp", "fsdp-blocks-dense")
_BUCKET = 25 * 2**20  # bytes, as DistributedDataParallel's


@dataclass
class Built:
    """One arm, ready to train.

    Attributes:
        step: (ids, labels) -> loss, compiled at its first call.
        model: whose runtime there is, if it is selective.
        unreduced: a context in which the backward pass leaves the gradients of the other processes alone.
        reduce: does once what the gradients' reduction does, by itself; None without other processes.
    """

    step: Step
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    unreduced: Callable[[], Any]
    reduce: Callable[[], None] | None

    @property
    def held_mb(self) -> float:
        """Memory of this process's parameters and of the optimizer's state."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        tensors = [*self.model.parameters(), *(value for value in states if isinstance(value, Tensor))]
        return sum(_local(tensor).nbytes for tensor in tensors) / 2**20


def build_arm(
    name: str, shape: Shape, *, device: str, dtype: torch.dtype, layers: int | None, compiler: str, ratio: float
) -> Built:
    """An arm of ``ARMS``; ``ratio``: min_tokens_ratio of a selective one."""
    model = build_model(shape, device=device, dtype=dtype, layers=layers)
    dense = name in DENSE
    if dense:
        model.set_attn_implementation(MASKLESS)
    dense_backend = own(torch._dynamo.lookup_backend(dense_compiler(compiler, cuda_graphs=False)["backend"]))
    sizes = [sum(_bytes(p) for p in model.parameters())]
    called: Any = model
    unreduced: Callable[[], Any] = nullcontext
    reduce: Callable[[], None] | None = None
    if name.startswith("ddp"):
        # buckets are views of .grad, so no copy of the gradients
        called = DistributedDataParallel(model, gradient_as_bucket_view=True)
        unreduced, reduce = called.no_sync, _all_reduce(sizes[0], device, dtype)
    elif name.startswith("fsdp"):
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        if name == "fsdp-blocks-dense":
            blocks = list(model.model.layers)
            parts = [sum(_bytes(p) for p in block.parameters()) for block in blocks]
            sizes = [*parts, sizes[0] - sum(parts)]
            for block in blocks:
                block.compile(backend=dense_backend)
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        unreduced, reduce = lambda: _not_synchronised(model), _reduce_scatter(sizes, device, dtype)
    if name == "fsdp-blocks-dense":
        step = loss_of(called)
    elif dense:
        step = loss_of(torch.compile(called, backend=dense_backend))
    else:
        options: dict[str, Any] = {"fallback": "error", "min_tokens_ratio": ratio, "compiler": compiler}
        step = loss_of(torch.compile(called, backend=own(cggr), options=options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
    return Built(step, model, optimizer, unreduced, reduce)


def own(backend: Callable[..., Any]) -> Callable[..., Any]:
    """The backend as another one, for Dynamo."""
    return lambda *arguments, **settings: backend(*arguments, **settings)


@contextmanager
def _not_synchronised(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def _all_reduce(size: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Of gradients of so many bytes, bucket by bucket."""
    element = dtype.itemsize

    def run() -> None:
        buffer = torch.empty(size // element, device=device, dtype=dtype)
        works = [dist.all_reduce(part, async_op=True) for part in buffer.split(_BUCKET // element)]
        for work in works:
            work.wait()

    return run


def _reduce_scatter(sizes: list[int], device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Of gradients in groups of so many bytes."""
    world = dist.get_world_size()
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before torch 2.13

    def run() -> None:
        for size in sizes:
            share = -(-size // dtype.itemsize // world)
            whole = torch.empty(share * world, device=device, dtype=dtype)
            scatter(torch.empty(share, device=device, dtype=dtype), whole)

    return run


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
