"""The ways of computing the cross-entropy of some rows, from hidden states to gradients, that kernels.py compares.

logits               ``linear`` and ``F.cross_entropy`` under ``torch.compile``: the backend's own default.
chunked              the same over chunks of rows, each recomputed in the backward (activation checkpointing).
cggr                 ``cggr::linear_cross_entropy``: the option ``cross_entropy="fused"``.
torch                ``F.linear_cross_entropy`` in chunks (torch 2.13).
cut-cross-entropy    the package of that name, and without its filter for small gradients.
Liger                the package liger-kernel.

All take the mean over the rows, which every one of them can do; gathering the rows is the same for all and left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cggr_compile.ops.linear_cross_entropy import linear_cross_entropy

CHUNKS = 8
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Arm(NamedTuple):
    """``loss(rows [K, H], weight [V, H], labels [K])``; ``waits``: it may wait for the device, no CUDA graph of it."""

    loss: Loss
    waits: bool = False


def _from_logits(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(rows, weight).float(), labels)


def _chunked(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    parts = zip(rows.chunk(CHUNKS), labels.chunk(CHUNKS), strict=True)
    sums = [checkpoint(_sum, part, weight, target, use_reentrant=False) for part, target in parts]
    return torch.stack(sums).sum() / rows.shape[0]


def _sum(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(rows, weight).float(), labels, reduction="sum")


def _ours(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = linear_cross_entropy(rows, weight, None, labels, 1.0, 0.0, 0.0)[0]
    return loss.mean()


def arms(device: str) -> dict[str, Arm]:
    """What can run here, the baseline first."""
    backend = "inductor" if device == "cuda" else "aot_eager"  # the CPU rehearses: generated code takes its time
    found = {
        "logits": Arm(torch.compile(_from_logits, backend=backend)),
        "chunked": Arm(torch.compile(_chunked, backend=backend)),
        "cggr": Arm(_ours),
    }
    fused: Any = getattr(F, "linear_cross_entropy", None)
    if fused is not None:
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch"] = Arm(lambda rows, weight, labels: fused(rows, weight, labels, options=options), waits=True)
    cut = _optional("cut_cross_entropy") if device == "cuda" else None
    if cut is not None:
        found["cut-cross-entropy"] = Arm(_library(cut.linear_cross_entropy), waits=True)
        found["cut-cross-entropy, exact"] = Arm(_library(cut.linear_cross_entropy, filter_eps=None), waits=True)
    liger = _optional("liger_kernel.transformers.functional") if device == "cuda" else None
    if liger is not None:
        found["Liger"] = Arm(_library(liger.liger_fused_linear_cross_entropy), waits=True)
    return found


def _library(function: Any, **options: Any) -> Loss:
    return lambda rows, weight, labels: function(rows, weight, labels, **options)


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
