"""A model with its optimizer, trained and timed step by step, to be compared with others."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from comparison import RunRecord, StepTimes
from torch import Tensor

from cggr_compile.compat import cpp_compiler

Batch = tuple[Tensor, Tensor]  # ids and labels, int64 [B, S] each


def dense_backend(compiler: str, device: str) -> str:
    """What plain torch.compile runs on: Inductor; without a C++ compiler no code generation, as for backend "cggr"."""
    if compiler == "eager" or (compiler == "auto" and device == "cpu" and cpp_compiler() is None):
        return "aot_eager"
    return "inductor"


def compile_model(model: torch.nn.Module, options: dict[str, Any] | None, dense: str) -> None:
    """In place; ``options`` of the backend "cggr", or None for plain torch.compile on the backend ``dense``."""
    if options is None:
        model.compile(backend=dense, dynamic=False)
    else:
        model.compile(backend="cggr", options=options)


def precision(device: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Run:
    """A compiled model, what trains it, and the record of what it did.

    The learning rate grows to ``lr`` over ``warmup`` steps, and stays there.
    """

    def __init__(self, record: RunRecord, model: torch.nn.Module, lr: float, warmup: int, device: str = "cpu") -> None:
        self.record, self.model, self.device = record, model, device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup))
        )

    def step(self, batch: Batch, times: StepTimes) -> float:
        """Train on one batch, add to ``times`` what it took, and return the loss."""
        ids, labels = batch
        start = now(self.device)
        with precision(self.device):
            loss = self.model(input_ids=ids, labels=labels).loss
        forward = now(self.device)
        loss.backward()
        backward = now(self.device)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        times.add(forward - start, backward - forward, now(self.device) - start)
        return float(loss.item())
