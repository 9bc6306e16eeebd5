"""A few training steps under one setting: their time, memory and selection. They leave the model as it was."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from cggr_compile import compat
from cggr_compile.engine import engine_for
from cggr_compile.registry import registry

if TYPE_CHECKING:
    from cggr_compile.selection_view import SelectionView

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """What was measured.

    Attributes:
        seconds: a median step: forward and backward pass.
        kept_bytes: tensors that the forward keeps for the backward pass, without parameters and inputs.
        level: "routed", "loss" or "dense". reason: what was found, or why it is dense.
        views: the selection of each batch; none where it is dense.
    """

    seconds: float
    kept_bytes: int
    level: str = "dense"
    reason: str = ""
    views: tuple[SelectionView, ...] = ()


def dense_trial(model: Module, batches: Sequence[Batch], *, compiler: str, steps: int) -> Trial:
    """Steps of the model as it is, by the compiler that the backend would take.

    Args:
        compiler: the option ``compiler``. steps: that are timed, after two others.
    """
    engine, _ = engine_for(device_of(model), compiler)
    with left_alone(model):
        torch_backend = "aot_eager" if engine == "eager" else "inductor"
        return Trial(*_measure(model, torch.compile(model.forward, backend=torch_backend), batches, steps))


def selective_trial(model: Module, batches: Sequence[Batch], options: Mapping[str, Any], *, steps: int) -> Trial:
    """Steps under the backend with ``options``."""
    from cggr_compile.backend import cggr

    with left_alone(model), registry.replaced(compat.original_module(model)) as runtime:
        call = torch.compile(model.forward, backend=cggr, options={**options, "fallback": "silent"})
        seconds, kept = _measure(model, call, batches, steps)
        views = []
        for batch in batches:
            with runtime.observed() as seen:
                call(**batch)
            views += [report.view for report in seen if report.view is not None]
        metrics = runtime.metrics()
        level = metrics["level"] or "dense"
        report = next((r for r in reversed(runtime.reports) if r.training), None)
        reason = metrics["fallback_reason"] or (report.reason if report is not None else "")
        return Trial(seconds, kept, level, reason, tuple(views))


def device_of(model: Module) -> str:
    """The kind of device that a model is on."""
    return next((p.device.type for p in model.parameters()), "cpu")


@contextmanager
def left_alone(model: Module) -> Iterator[None]:
    """Afterwards the model's mode, gradients and buffers, and random generators, are what they were."""
    grads, training = [(p, p.grad) for p in model.parameters()], model.training
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            model.train()
            yield
    finally:
        model.train(training)
        for parameter, grad in grads:
            parameter.grad = grad
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def loss_of(output: Any) -> Tensor:
    """The loss among what a model returns: ``.loss``, the result itself, or the first of several that is one number.

    Raises:
        ValueError: there is none that has a gradient.
    """
    found = getattr(output, "loss", None)
    values = [found] if found is not None else output if isinstance(output, (tuple, list)) else [output]
    for value in values:
        if isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad:
            return value
    raise ValueError(f"model must return a loss with a gradient when it is given labels, got {type(output)}")


def _measure(model: Module, call: Callable[..., Any], batches: Sequence[Batch], steps: int) -> tuple[float, int]:
    def wait() -> None:
        if device_of(model) == "cuda":
            torch.cuda.synchronize()

    seconds, kept = [], 0
    for step in range(steps + 2):
        batch = batches[step % len(batches)]
        model.zero_grad(set_to_none=True)
        wait()
        begin = time.perf_counter()
        loss = loss_of(call(**batch))
        if step == 1:
            kept = _bytes(loss, [*model.parameters(), *model.buffers(), *batch.values()])
        loss.backward()
        wait()
        if step > 1:  # before, it compiles, and allocates
            seconds.append(time.perf_counter() - begin)
        del loss
    return statistics.median(seconds), kept


def _bytes(loss: Tensor, others: Sequence[Any]) -> int:
    """The memory that is kept for the backward pass and is nothing of ``others``."""
    known = {other.untyped_storage().data_ptr() for other in others if isinstance(other, Tensor)}
    storages = {kept.untyped_storage().data_ptr(): kept.untyped_storage() for kept in compat.kept_for_backward(loss)}
    return sum(storage.nbytes() for place, storage in storages.items() if place not in known)
