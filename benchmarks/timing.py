"""One training step, measured: forward and backward, no optimizer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # benchmarks of layers need no transformers
    from arms import Step

MB = 2**20
LEAD_IN = 3  # steps


@dataclass
class Sample:
    """Milliseconds and megabytes of one step.

    step: the sum of forward and backward; of ``run_step`` with steps before it, the period of the loop.
    peak_mb: CUDA only: most memory allocated during the step less what was allocated before it (parameters, batch,
        whatever else lives between steps; gradients are None then, so the new gradients count).
    saved_mb: what the forward keeps for the backward. CUDA: allocated after the forward less before it. CPU: the
        tensors that the autograd graph of the loss holds, without the parameters and the batch.
    """

    forward: float
    backward: float
    step: float
    loss: float
    peak_mb: float | None
    saved_mb: float | None


def run_step(
    step: Step,
    batch: tuple[Tensor, Tensor],
    parameters: Sequence[Tensor],
    *,
    lead_in: bool = False,
    memory: bool = True,
) -> Sample:
    """Run a step and measure it. On CUDA the device is waited for at the end only.

    ``parameters``: the model's, whose gradients are set to None before, as an optimizer does it.

    ``lead_in``: run some steps before, not measured, and do not wait for them. On CUDA the measured step then finds
    the queue as a training loop leaves it: a step that is bound by the device shows the device's time, one that is
    bound by launches shows the host's. (After one such step the host is not yet ahead of the device.) Of a host that
    is behind, the forward shows what passes between the call and its first kernel, although in a loop the device
    spends a part of that on the backward before. So the step is measured from the end of the one before to its own.

    ``memory=False`` leaves memory out: what CUDA graphs use is allocated once, not step by step.
    """
    device = batch[0].device.type
    for _ in range(LEAD_IN if lead_in else 0):
        _begin(parameters, device)
        step(*batch).backward()
    before = stamp(device) if lead_in else None
    _begin(parameters, device)
    static = torch.cuda.memory_allocated() if device == "cuda" else 0
    start = stamp(device)
    loss = step(*batch)
    middle = stamp(device)
    saved = None
    if memory:  # counting takes time on the CPU: neither the forward's nor the backward's
        inputs = (*parameters, *batch)
        saved = (torch.cuda.memory_allocated() - static if device == "cuda" else saved_bytes(loss, inputs)) / MB
    resume = stamp(device) if device == "cpu" else middle
    loss.backward()
    end = stamp(device)
    if device == "cuda":
        torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - static) / MB if memory and device == "cuda" else None
    forward, backward = milliseconds(start, middle), milliseconds(resume, end)
    period = forward + backward if before is None else milliseconds(before, end)
    return Sample(forward, backward, period, float(loss.detach()), peak, saved)


def _begin(parameters: Sequence[Tensor], device: str) -> None:
    for parameter in parameters:
        parameter.grad = None
    if device == "cuda":
        torch.compiler.cudagraph_mark_step_begin()
        torch.cuda.reset_peak_memory_stats()


def stamp(device: str) -> Any:
    """A moment: a CUDA event, or seconds of the host's clock."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start: Any, end: Any) -> float:
    return float(start.elapsed_time(end) if isinstance(start, torch.cuda.Event) else 1e3 * (end - start))


def saved_bytes(loss: Tensor, other: Iterable[Tensor]) -> int:
    """Bytes of the tensors that the autograd graph of ``loss`` holds, each memory once, those of ``other`` left out."""
    skip = {tensor.untyped_storage().data_ptr() for tensor in other}
    found: dict[int, int] = {}
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        for value in _saved_by(node):
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(size for pointer, size in found.items() if pointer not in skip)


def _saved_by(node: Any) -> Iterable[Any]:
    """What an autograd node holds: a compiled function has ``saved_tensors``, an operator's node ``_saved_*``."""
    if hasattr(node, "saved_tensors"):
        return node.saved_tensors  # type: ignore[no-any-return]
    return [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
