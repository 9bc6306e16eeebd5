"""The ways of spreading one training step over several processes that distributed.py compares.

alone-dense        no other process: what scaling is measured against. Causal attention without a mask tensor.
alone              the same with ``backend="cggr"``.
ddp-dense          ``torch.compile(DistributedDataParallel(model))``, as users do: DDPOptimizer cuts the graph at
                   gradient buckets, whose reductions overlap with the backward pass.
ddp                the same with ``backend="cggr"``, which asks for the whole graph.
fsdp-dense         ``fully_shard`` at the root, the whole model compiled.
fsdp               the same with ``backend="cggr"``.
fsdp-blocks-dense  ``fully_shard`` for every block and the root, every block compiled by itself (torchtitan's way).
shard              ``cggr_compile.distributed.shard`` and ``backend="cggr"``: gathers and reductions inside the graph.
shard-dense        the same at ratio 1.0, on every token.
shard-kept         `shard` with ``reshard_after_forward=False``: the backward pass gathers nothing.
shard-inductor     `shard` with Inductor's own bucketing and overlap of collectives instead of ours.
ddp-graph          parameters copied by `shard`, on a mesh with one shard: the all-reduces of DistributedDataParallel
                   inside of the backward graph.
ddp-python         `ddp` with ``torch._dynamo.config.optimize_ddp = "python_reducer"``: compiled autograd captures the
                   all-reduces with the backward pass.

Every arm has a model and an optimizer of its own: what is wrapped cannot be unwrapped. And a backend of its own: Dynamo
would run what it has captured without DistributedDataParallel, uncut, for a model under it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
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
from cggr_compile.distributed import shard

DENSE = ("alone-dense", "ddp-dense", "fsdp-dense", "fsdp-blocks-dense")
SHARDED = ("shard-dense", "shard", "shard-kept", "shard-inductor", "ddp-graph")
SELECTIVE = ("alone", "ddp", "fsdp", "shard", "shard-kept", "shard-inductor", "ddp-graph", "ddp-python")
DEFAULT_ARMS = (
    "alone-dense",
    "alone",
    "ddp-dense",
    "ddp",
    "fsdp-dense",
    "fsdp",
    "fsdp-blocks-dense",
    "shard-dense",
    "shard",
)
ARMS = (*DEFAULT_ARMS, "shard-kept", "shard-inductor", "ddp-graph", "ddp-python")
# what Inductor does with collectives where it is told to
INDUCTOR_OVERLAP = {
    "post_grad_custom_post_pass": None,
    "aten_distributed_optimizations.enable_overlap_scheduling": True,
    "aten_distributed_optimizations.collective_bucketing": True,
}
_BUCKET = 25 * 2**20  # bytes, as DistributedDataParallel's


@dataclass
class Built:
    """One arm, ready to train.

    Attributes:
        step: (ids, labels) -> loss, compiled at its first call.
        model: whose runtime there is, if it is selective.
        unreduced: a context in which the backward pass leaves the gradients of the other processes alone; None if
            there is none.
        sent: bytes of gradients that are reduced, and of parameters that are gathered in the forward and in the
            backward pass.
        reduce: does once what the gradients' reduction does, by itself; None without other processes.
    """

    step: Step
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    unreduced: Callable[[], Any] | None
    reduce: Callable[[], None] | None
    sent: dict[str, int]
    around: Callable[[], Any] = nullcontext

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
    if dense or name == "shard-dense":
        model.set_attn_implementation(MASKLESS)
    dense_backend = own(torch._dynamo.lookup_backend(dense_compiler(compiler, cuda_graphs=False)["backend"]))
    sizes = [sum(_bytes(p) for p in model.parameters())]
    called: Any = model
    unreduced: Callable[[], Any] | None = nullcontext
    reduce: Callable[[], None] | None = None
    around: Callable[[], Any] = nullcontext
    sent = {"reduced": sizes[0], "gathered_forward": 0, "gathered_backward": 0}
    options: dict[str, Any] = {"fallback": "error", "min_tokens_ratio": ratio, "compiler": compiler}
    world = dist.get_world_size()
    if name in SHARDED:
        dimensions = (world, 1) if name == "ddp-graph" else (world,)
        shard(model, init_device_mesh(device, dimensions), reshard_after_forward=name != "shard-kept")
        unreduced = None
        if name == "ddp-graph":
            reduce = _all_reduce(sizes[0], device, dtype)
        else:
            reduce = _reduce_scatter(sizes, device, dtype)
            sent |= {"gathered_forward": sizes[0], "gathered_backward": 0 if name == "shard-kept" else sizes[0]}
        if name == "shard-inductor":
            options["inductor"] = INDUCTOR_OVERLAP
        if name == "shard-dense":
            options |= {"min_tokens_ratio": 1.0, "fallback": "warn"}
    elif name.startswith("ddp"):
        if name == "ddp-python":
            around = partial(_python_reducer, dense_backend)
        with around():
            # buckets are views of .grad, so no copy of the gradients
            called = DistributedDataParallel(model, gradient_as_bucket_view=name != "ddp-python")
        # what compiled autograd has captured reduces
        unreduced = None if name == "ddp-python" else called.no_sync
        reduce = _all_reduce(sizes[0], device, dtype)
    elif name.startswith("fsdp"):
        mesh = init_device_mesh(device, (world,))
        sent |= {"gathered_forward": sizes[0], "gathered_backward": 0 if name != "fsdp-blocks-dense" else sizes[0]}
        if name == "fsdp-blocks-dense":
            blocks = list(model.model.layers)
            parts = [sum(_bytes(p) for p in block.parameters()) for block in blocks]
            sizes = [*parts, sizes[0] - sum(parts)]
            for block in blocks:
                block.compile(backend=dense_backend)
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        unreduced, reduce = lambda: _not_synchronised(model), _reduce_scatter(sizes, device, dtype)
    else:
        sent["reduced"] = 0
    if name == "fsdp-blocks-dense":
        step = loss_of(called)
    elif dense:
        step = loss_of(torch.compile(called, backend=dense_backend))
    else:
        step = loss_of(torch.compile(called, backend=own(cggr), options=options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
    return Built(step, model, optimizer, unreduced, reduce, sent, around)


def own(backend: Callable[..., Any]) -> Callable[..., Any]:
    """The backend as another one, for Dynamo."""
    return lambda *arguments, **settings: backend(*arguments, **settings)


@contextmanager
def _python_reducer(backend: Callable[..., Any]) -> Iterator[None]:
    """DistributedDataParallel reduces in hooks that compiled autograd captures, and ``backend`` compiles."""
    compile_backward = partial(torch.compile, backend=backend)
    with (
        torch._dynamo.config.patch(optimize_ddp="python_reducer"),
        torch._dynamo.compiled_autograd._enable(compile_backward),
    ):
        yield


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
