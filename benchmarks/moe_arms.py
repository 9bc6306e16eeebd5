"""The ways of computing one Mixture-of-Experts layer that ``moe.py`` compares: bfloat16 experts, SwiGLU.

ours         ``cggr::moe_top_experts`` and ``cggr::moe``: fused routing, grouped products, gather and combination.
grouped_mm   as transformers does it: softmax, ``torch.topk``, sort, gather, ``F.grouped_mm``, SwiGLU,
             ``F.grouped_mm``, routing weights, unsort, sum.
loop         the same, with a loop of products over the experts; it waits for the device to know their sizes.
module       ``PersistentTRMLP``: ours, with its auxiliary loss and metrics.
dense        no routing: two products of the same FLOPs over rows that lie ready, and SwiGLU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cggr_compile
from cggr_compile.ops.moe import moe
from cggr_compile.ops.moe_routing import moe_top_experts

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    experts: int
    top_k: int
    tokens: int

    @property
    def flops(self) -> int:
        """Of the products of one forward, router left out; the backward has twice as many."""
        return 6 * self.tokens * self.top_k * self.hidden * self.inner


SHAPES = {
    "e8-h1024-i4096": Shape(1024, 4096, 8, 2, 16384),
    "e128-h2048-i768": Shape(2048, 768, 128, 8, 32768),
    "tiny": Shape(32, 16, 4, 2, 64),
}
# arms that compute the same function of the same weights
ROUTED = ("grouped_mm", "ours", "loop", "module")
ARMS = (*ROUTED, "dense")
BASELINE = "grouped_mm"


class Weights(cggr_compile.PersistentTRMLP):
    """The layer whose parameters all arms share, and one expert's for the dense arm: as slices of the experts', their
    gradient would be as large as that of all experts."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        super().__init__(shape.hidden, shape.inner, shape.experts, shape.top_k, device=device, dtype=dtype)
        self.dense_gate_up = nn.Parameter(self.gate_up_proj[0].detach().clone())
        self.dense_down = nn.Parameter(self.down_proj[0].detach().clone())


def build_weights(shape: Shape, device: str, dtype: torch.dtype) -> Weights:
    torch.manual_seed(0)
    return Weights(shape, device, dtype)


def build_arm(name: str, layer: Weights) -> Layer:
    """A function from tokens [N, H] to the layer's output, differentiable in the tokens and the parameters."""
    if name == "module":
        return lambda hidden: layer(hidden)[0]
    body = {"ours": _ours, "grouped_mm": _grouped_mm, "loop": _loop, "dense": _dense}[name]
    return lambda hidden: body(layer, hidden)


def _weights(layer: Weights, hidden: Tensor) -> Tensor:
    """Router probabilities."""
    return F.linear(hidden, layer.router).float().softmax(-1)


def _normalized(layer: Weights, chosen: Tensor) -> Tensor:
    return chosen / chosen.sum(-1, keepdim=True) if layer.top_k > 1 else chosen


def _ours(layer: Weights, hidden: Tensor) -> Tensor:
    probabilities = _weights(layer, hidden)
    experts = moe_top_experts(probabilities.detach(), layer.top_k)
    weights = _normalized(layer, probabilities.gather(1, experts))
    out: Tensor = moe(hidden, layer.gate_up_proj, layer.down_proj, weights, experts)
    return out


def _swiglu(inner: Tensor) -> Tensor:
    gate, up = inner.chunk(2, -1)
    return F.silu(gate) * up


def _sorted(layer: Weights, hidden: Tensor, products: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Everything around the products over sorted rows [N * top_k, H] with the experts' ends [E]."""
    weights, experts = _weights(layer, hidden).topk(layer.top_k, -1)
    ordered, order = experts.flatten().sort()
    ends = torch.histc(ordered.float(), layer.num_experts, min=0, max=layer.num_experts - 1).cumsum(0).int()
    rows = products(hidden[order // layer.top_k], ends)
    rows = rows * _normalized(layer, weights).flatten()[order, None].to(rows.dtype)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return rows[back].view(*experts.shape, -1).sum(1)


def _grouped_mm(layer: Weights, hidden: Tensor) -> Tensor:
    def products(rows: Tensor, ends: Tensor) -> Tensor:
        inner = F.grouped_mm(rows, layer.gate_up_proj.mT, offs=ends)
        return F.grouped_mm(_swiglu(inner), layer.down_proj.mT, offs=ends)

    return _sorted(layer, hidden, products)


def _loop(layer: Weights, hidden: Tensor) -> Tensor:
    def products(rows: Tensor, ends: Tensor) -> Tensor:
        bounds = [0, *ends.tolist()]
        parts = [
            _swiglu(rows[start:end] @ gate_up.T) @ down.T
            for (start, end), gate_up, down in zip(
                itertools.pairwise(bounds), layer.gate_up_proj, layer.down_proj, strict=True
            )
        ]
        return torch.cat(parts)

    return _sorted(layer, hidden, products)


def _dense(layer: Weights, hidden: Tensor) -> Tensor:
    return _swiglu(hidden @ layer.dense_gate_up.T) @ layer.dense_down.T


def clear_choices(layer: Weights, hidden: Tensor) -> Tensor:
    """[N]: whose k-th expert is better than the next one; the others' choice is anybody's, and is not compared."""
    if layer.top_k == layer.num_experts:
        return torch.ones_like(hidden[:, 0], dtype=torch.bool)
    best = _weights(layer, hidden).topk(layer.top_k + 1, -1).values
    return best[:, -2] > best[:, -1]
