"""Operands of the grouped products for one shape, what each computes, and the same by other means."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from moe_arms import Shape
from torch import Tensor

ROWS = ("swiglu", "down", "swiglu_backward", "d_hidden")
KERNELS = (*ROWS, "d_gate_up", "d_down")
Outcome = tuple[Tensor, ...]


class Problem:
    """Operands of every kernel for one shape, in bfloat16, with a random routing."""

    def __init__(self, shape: Shape, device: str = "cuda") -> None:
        from cggr_compile.ops.moe_routing import moe_permute

        torch.manual_seed(0)
        self.shape, rows = shape, shape.tokens * shape.top_k
        hidden, inner, experts = shape.hidden, shape.inner, shape.experts

        def make(*size: int) -> Tensor:
            return torch.randn(size, device=device, dtype=torch.bfloat16)

        self.tokens, self.grad = make(shape.tokens, hidden), make(shape.tokens, hidden)
        self.gate_up, self.down = make(experts, 2 * inner, hidden) * 0.03, make(experts, hidden, inner) * 0.03
        self.activation, self.inner, self.d_inner = make(rows, inner), make(rows, 2 * inner), make(rows, 2 * inner)
        self.weights = torch.rand(shape.tokens, shape.top_k, device=device)
        self.chosen = torch.rand(shape.tokens, experts, device=device).argsort(1)[:, : shape.top_k]
        self.order, self.position, self.offsets = moe_permute(self.chosen, experts)
        self.token_rows, self.grad_rows = (t[self.order // shape.top_k] for t in (self.tokens, self.grad))

    def flops(self, kernel: str) -> int:
        return self.shape.flops // 3 * (2 if kernel in ("swiglu", "d_hidden", "d_gate_up") else 1)

    def call(self, kernel: str, setting: dict[str, Any]) -> Callable[[], Outcome]:
        """A function that runs the kernel and returns what it wrote."""
        from cggr_compile.kernels.moe_products import multiply_rows
        from cggr_compile.kernels.moe_weight_gradient import weight_gradient

        setting = dict(setting)
        gathered = setting.pop("GATHERED", False)
        tokens, grad = (self.token_rows, self.grad_rows) if gathered else (self.tokens, self.grad)
        permuted = (self.order, self.offsets, self.shape.top_k)
        if kernel in ("d_gate_up", "d_down"):
            left, right = (self.d_inner, tokens) if kernel == "d_gate_up" else (grad, self.activation)
            return lambda: (weight_gradient(kernel, left, right, *permuted, gathered, **setting),)
        a, b = {
            "swiglu": (tokens, self.gate_up),
            "down": (self.activation, self.down),
            "swiglu_backward": (grad, self.down),
            "d_hidden": (self.d_inner, self.gate_up),
        }[kernel]
        width = self.shape.inner if "swiglu" in kernel else self.shape.hidden
        out = self.tokens.new_empty(self.order.shape[0], width)
        d_inner = torch.empty_like(self.inner) if kernel == "swiglu_backward" else None
        inner = {"swiglu": torch.empty_like(self.inner), "swiglu_backward": self.inner}.get(kernel)
        queues: dict[int, Tensor] = {}  # the first call fills it: the schedule is not part of the time

        def rows() -> Outcome:
            parts = multiply_rows(
                *(kernel, a, b, out, self.offsets),
                order=self.order,
                top_k=self.shape.top_k,
                inner=inner,
                d_inner=d_inner,
                weights=self.weights,
                queues=queues,
                gathered=gathered,
                **setting,
            )
            written = [out, d_inner, inner if kernel == "swiglu" else None, None if parts is None else parts.sum(0)]
            return tuple(tensor for tensor in written if tensor is not None)

        return rows

    def by_expert(self, of_rows: Tensor, matrices: Tensor) -> Tensor:
        """[rows, N] in float32: each expert's rows times its matrix."""
        bounds = itertools.pairwise(self.offsets.tolist())
        parts = [
            of_rows[start:end].float() @ matrix.float() for (start, end), matrix in zip(bounds, matrices, strict=True)
        ]
        return torch.cat(parts)

    def reference(self, kernel: str) -> Outcome:
        """What the kernel has to write, in float32, by PyTorch's products of one expert after the other."""
        if kernel in ("d_gate_up", "d_down"):
            sides = (self.d_inner, self.token_rows) if kernel == "d_gate_up" else (self.grad_rows, self.activation)
            bounds = itertools.pairwise(self.offsets.tolist())
            left, right = sides
            return (torch.stack([left[low:high].float().T @ right[low:high].float() for low, high in bounds]),)
        if kernel == "down":
            return (self.by_expert(self.activation, self.down.mT),)
        if kernel == "d_hidden":
            return (self.by_expert(self.d_inner, self.gate_up),)
        if kernel == "swiglu":
            inner = self.by_expert(self.token_rows, self.gate_up.mT)
            gate, up = inner.chunk(2, -1)
            return F.silu(gate) * up, inner
        product, weight = self.by_expert(self.grad_rows, self.down), self.weights.view(-1)[self.order.long()][:, None]
        gate, up = self.inner.float().chunk(2, -1)
        silu, sigmoid = F.silu(gate), gate.sigmoid()
        d_gate = product * weight * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_inner = torch.cat([d_gate, product * weight * silu], 1)
        return silu * up * weight, d_inner, (product * silu * up).sum(1)

    def grouped_mm(self, kernel: str) -> Callable[[], Tensor]:
        """PyTorch's product of the same sizes, over sorted rows."""
        ends = self.offsets[1:].clone()
        a, b = {
            "swiglu": (self.token_rows, self.gate_up.mT),
            "down": (self.activation, self.down.mT),
            "swiglu_backward": (self.grad_rows, self.down),
            "d_hidden": (self.d_inner, self.gate_up),
            "d_gate_up": (self.d_inner.mT, self.token_rows),
            "d_down": (self.grad_rows.mT, self.activation),
        }[kernel]
        return lambda: F.grouped_mm(a, b, offs=ends)

    def dense(self, kernel: str) -> Callable[[], Tensor]:
        """A product of the same rows with one matrix, for the weights' gradients of one expert's share of rows."""
        if kernel in ("d_gate_up", "d_down"):
            left, right = (
                (self.d_inner, self.token_rows) if kernel == "d_gate_up" else (self.grad_rows, self.activation)
            )
            experts = self.shape.experts
            share = left.shape[0] // experts
            left, right = (t[: share * experts].view(experts, share, -1) for t in (left, right))
            return lambda: torch.bmm(left.mT, right)
        a, b = {
            "swiglu": (self.token_rows, self.gate_up[0].T),
            "down": (self.activation, self.down[0].T),
            "swiglu_backward": (self.grad_rows, self.down[0]),
            "d_hidden": (self.d_inner, self.gate_up[0]),
        }[kernel]
        return lambda: a @ b
