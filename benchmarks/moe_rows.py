"""The experts' backward from some of the rows, as the backend calls it: ``moe.py --rows 0.25 0.05``.

The forward has run for every token. Of the selected tokens the backward gathers what it needs, sorts their (token,
expert) pairs anew and computes the gradients of tokens, routing weights and experts. A share of the rows takes that
share of the arithmetic, but every expert's matrices are read and their gradients written all the same: the floor, which
is the time of a copy of the matrices. Before anything is timed, each share's gradients are compared with those of every
row, the other tokens' gradient being zero.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from moe_arms import SHAPES
from results import text
from rich.table import Table
from timing import milliseconds, stamp
from torch import Tensor

from cggr_compile import lowerings
from cggr_compile.ops.moe import moe_mlp, moe_mlp_backward
from cggr_compile.ops.moe_routing import moe_permute

TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # relative, in norm
WARM_UP = 3
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


class Backward:
    """The operands of one shape, after a forward with a random routing."""

    def __init__(self, shape_name: str, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.shape = shape = SHAPES[shape_name]

        def make(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(size, device=device, dtype=dtype) * scale

        self.hidden, self.grad = make(shape.tokens, shape.hidden), make(shape.tokens, shape.hidden)
        self.gate_up = make(shape.experts, 2 * shape.inner, shape.hidden, scale=shape.hidden**-0.5)
        self.down = make(shape.experts, shape.hidden, shape.inner, scale=shape.inner**-0.5)
        self.weights = torch.rand(shape.tokens, shape.top_k, device=device)
        self.chosen = torch.rand(shape.tokens, shape.experts, device=device).topk(shape.top_k).indices
        self.permuted = moe_permute(self.chosen, shape.experts)
        self.inner = moe_mlp(self.hidden, self.gate_up, self.down, self.weights, *self.permuted, True)[1]

    def of_all(self, grad: Tensor) -> Gradients:
        """``grad``: [tokens, hidden]."""
        operands = (self.hidden, self.gate_up, self.down, self.weights, self.inner)
        found: Gradients = moe_mlp_backward(grad, *operands, *self.permuted)
        return found

    def of_rows(self, grad: Tensor, rows: Tensor) -> Gradients:
        """``grad``: [selected, hidden]. As the rule of the row-sparse pass does it (``rules/experts.py``)."""
        order, *rest = moe_permute(self.chosen[rows], self.shape.experts)
        top_k = self.shape.top_k
        pair = rows[order.div(top_k, rounding_mode="floor")] * top_k + order.remainder(top_k)
        inner = self.inner[self.permuted[1][pair]]
        matrices = (self.gate_up, self.down)
        found: Gradients = moe_mlp_backward(grad, self.hidden[rows], *matrices, self.weights[rows], inner, order, *rest)
        return found

    def selected(self, share: float) -> Tensor:
        count = max(1, round(share * self.shape.tokens))
        return torch.randperm(self.shape.tokens, device=self.hidden.device)[:count].sort().values

    def disagreement(self, rows: Tensor) -> float:
        """The largest relative difference, in norm, of a gradient from ``rows`` and from every row."""
        grad = torch.zeros_like(self.grad).index_copy(0, rows, self.grad[rows])
        whole, some = self.of_all(grad), self.of_rows(self.grad[rows], rows)
        pairs = [(whole[0][rows], some[0]), (whole[1], some[1]), (whole[2], some[2]), (whole[3][rows], some[3])]
        return max(float((a.float() - b.float()).norm() / a.float().norm()) for a, b in pairs)


def measure(shape_name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The times of every share and of the floor, taken in turns.

    Raises:
        RuntimeError: if a share's gradients are others than those of every row.
    """
    case = Backward(shape_name, args.device, args.dtype)
    calls: dict[str, Callable[[], Any]] = {}
    result: dict[str, Any] = {"shape": shape_name, **vars(case.shape), "how": args.how, "rows": {}}
    for share in [1.0, *args.rows]:
        rows = case.selected(share)
        if share < 1.0 and not (error := case.disagreement(rows)) <= TOLERANCE[args.dtype]:
            raise RuntimeError(f"the gradients from {share:g} of the rows are {error:.1e} off")
        operands = (case.grad,) if share == 1.0 else (case.grad[rows], rows)
        body: Callable[..., Any] = case.of_all if share == 1.0 else case.of_rows
        if args.how != "eager":
            lowerings.register()  # as the backend does
            mode = "max-autotune-no-cudagraphs" if args.max_autotune else None
            body = torch.compile(body, mode=mode, dynamic=False)
        calls[f"{share:g}"] = partial(body, *operands)
        result["rows"][f"{share:g}"] = {"tokens": len(rows), "share": share}
    gradients = torch.empty_like(case.gate_up), torch.empty_like(case.down)
    calls["floor"] = lambda: (gradients[0].copy_(case.gate_up), gradients[1].copy_(case.down))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(WARM_UP + args.repeats):
        for name, call in calls.items():
            call()  # the device has a queue
            start = stamp(args.device)
            call()
            end = stamp(args.device)
            if args.device == "cuda":
                torch.cuda.synchronize()
            if number >= WARM_UP:
                times[name].append(milliseconds(start, end))
    for name, values in times.items():
        record = result["rows"].setdefault(name, {})
        record |= {"ms": median(values), "quartiles": quantiles(values, n=4) if len(values) > 1 else None}
        if "share" in record:
            record["tflops"] = 2 * record["share"] * case.shape.flops / record["ms"] / 1e9
    matrices = case.gate_up.numel() + case.down.numel()
    result["floor_bytes"] = 2 * matrices * case.gate_up.element_size()
    return result


def table(result: dict[str, Any]) -> Table:
    title = f"{result['shape']}, {result['tokens']} tokens, backward from some of the rows, {result['how']}"
    found = Table(title=title, title_justify="left", caption_justify="left")
    for column in ("rows", "tokens", "per expert", "ms", "of all", "share × all, ms", "over the floor", "TFLOP/s"):
        found.add_column(column, justify="right")
    whole, floor = result["rows"]["1"]["ms"], result["rows"]["floor"]["ms"]
    for name, record in result["rows"].items():
        if "share" not in record:
            continue
        found.add_row(
            *(name, str(record["tokens"]), f"{record['tokens'] * result['top_k'] / result['experts']:.0f}"),
            *(text(record["ms"], "{:.3f}"), f"{record['ms'] / whole:.2f}", f"{record['share'] * whole:.3f}"),
            *(f"{record['ms'] / floor:.1f}", f"{record['tflops']:.0f}"),
        )
    rate = result["floor_bytes"] / floor / 1e9
    size = result["floor_bytes"] / 1e6
    found.caption = f"floor: {floor:.3f} ms to read all matrices and write as much ({size:.0f} MB, {rate:.2f} TB/s)"
    return found
