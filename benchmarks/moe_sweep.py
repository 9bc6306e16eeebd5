"""Tile sizes of the grouped products, tried one after the other on a CUDA device: ``moe.py --sweep``.

For every grouped product of ``cggr_compile/kernels`` and every shape: the ten fastest settings, the setting in
force, and ``F.grouped_mm`` of the same product over rows that lie ready (without SwiGLU, gather or routing weights).
Times are medians of the device's. A setting whose result differs from that of the setting in force is left out.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe
from moe_arms import SHAPES, Shape
from results import machine_line, save
from rich.console import Console
from rich.progress import track
from torch import Tensor

ROWS = ("swiglu", "down", "swiglu_backward", "d_hidden")
KERNELS = (*ROWS, "d_gate_up", "d_down")
BEST = 10
# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps)
NARROW = ((128, 128, 64, 8), (128, 128, 64, 4), (128, 64, 64, 4), (64, 128, 64, 4), (256, 64, 64, 8))
WIDE = ((128, 256, 64, 8), (256, 128, 64, 8), (128, 128, 64, 4), (128, 128, 64, 8), (64, 256, 64, 4))
GROUPS = (1, 4, 16, 32)  # tried with the best of the others

Setting = dict[str, Any]


def settings(kernel: str) -> list[Setting]:
    """Everything but GROUP, which comes after."""
    found = []
    tiles = NARROW if kernel in ("swiglu", "swiglu_backward") else WIDE
    for (m, n, k, warps), stages in itertools.product(tiles, (3, 4)):
        tile = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=warps, num_stages=stages)
        if kernel not in ROWS:
            found.append(tile | dict(LIBRARY=False))
            continue
        gathers = (True, False) if kernel in ("swiglu", "swiglu_backward") else (True,)
        for flatten, gather in itertools.product((True, False), gathers):
            found.append(tile | dict(FLATTEN=flatten) | (dict(GATHER=gather) if len(gathers) > 1 else {}))
        if stages == 3:
            found.append(tile | dict(FLATTEN=False, DESCRIPTORS=False))
    return found


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
        chosen = torch.rand(shape.tokens, experts, device=device).argsort(1)[:, : shape.top_k]
        self.order, _, self.offsets = moe_permute(chosen, experts)

    def call(self, kernel: str, setting: Setting) -> Callable[[], Tensor]:
        """A function that runs the kernel and returns what it wrote."""
        from cggr_compile.kernels.moe_products import multiply_rows
        from cggr_compile.kernels.moe_weight_gradient import weight_gradient

        permuted = (self.order, self.offsets, self.shape.top_k)
        if kernel in ("d_gate_up", "d_down"):
            left, right = (self.d_inner, self.tokens) if kernel == "d_gate_up" else (self.grad, self.activation)
            return lambda: weight_gradient(kernel, left, right, *permuted, **setting)
        a, b = {
            "swiglu": (self.tokens, self.gate_up),
            "down": (self.activation, self.down),
            "swiglu_backward": (self.grad, self.down),
            "d_hidden": (self.d_inner, self.gate_up),
        }[kernel]
        out = (
            torch.empty_like(self.activation)
            if "swiglu" in kernel
            else self.tokens.new_empty(self.order.shape[0], self.shape.hidden)
        )
        d_inner = torch.empty_like(self.inner) if kernel == "swiglu_backward" else None
        inner = {"swiglu": torch.empty_like(self.inner), "swiglu_backward": self.inner}.get(kernel)
        queues: dict[int, Tensor] = {}  # the first call fills it: the schedule is not part of the time

        def rows() -> Tensor:
            multiply_rows(
                *(kernel, a, b, out, self.offsets),
                order=self.order,
                top_k=self.shape.top_k,
                inner=inner,
                d_inner=d_inner,
                weights=self.weights,
                queues=queues,
                **setting,
            )
            return out

        return rows

    def grouped_mm(self, kernel: str) -> Callable[[], Tensor]:
        """PyTorch's product of the same sizes, over sorted rows."""
        ends = self.offsets[1:].clone()
        rows = self.activation.new_empty(self.order.shape[0], self.shape.hidden).normal_()
        a, b = {
            "swiglu": (rows, self.gate_up.mT),
            "down": (self.activation, self.down.mT),
            "swiglu_backward": (rows, self.down),
            "d_hidden": (self.d_inner, self.gate_up),
            "d_gate_up": (self.d_inner.mT, rows),
            "d_down": (rows.mT, self.activation),
        }[kernel]
        return lambda: F.grouped_mm(a, b, offs=ends)


def median_ms(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=40, return_mode="median"))


def compile_ahead(name: str, kernel: str, setting: Setting) -> None:
    """In a process of its own: leaves the binary in Triton's cache. Few rows, but sizes that specialise alike."""
    shape = SHAPES[name]
    small = Shape(shape.hidden, shape.inner, 16, shape.top_k, 256)
    attempt(Problem(small), kernel, setting)


def attempt(problem: Problem, kernel: str, setting: Setting) -> Tensor | None:
    """The kernel's result; None where the device has too little shared memory, or too few registers."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return problem.call(kernel, setting)()
    except (OutOfResources, PTXASError, CompilationError):
        return None


def try_all(
    problem: Problem, name: str, kernel: str, found: Iterable[Setting], pool: Executor | None
) -> list[tuple[float, Setting]]:
    """(milliseconds, setting) of those that run and give the right result, fastest first."""
    todo = list(found)
    if pool is not None:
        list(pool.map(compile_ahead, *zip(*((name, kernel, setting) for setting in todo), strict=True)))
    wanted = problem.call(kernel, {})().float()
    times = []
    for setting in track(todo, f"{name} {kernel}"):
        got = attempt(problem, kernel, setting)
        if got is not None and float((got.float() - wanted).norm() / wanted.norm()) < 1e-2:
            times.append((median_ms(problem.call(kernel, setting)), setting))
    return sorted(times, key=lambda entry: entry[0])


def sweep(args: argparse.Namespace, console: Console) -> None:
    """Prints a list per kernel and shape, and writes all times to ``<json>-sweep.json``."""
    from cggr_compile.kernels.moe_tiles import configuration

    path = args.json.with_name(f"{args.json.stem}-sweep.json")
    document: dict[str, Any] = {"machine": describe("cuda"), "results": []}
    console.print(machine_line(document["machine"]), highlight=False)
    # one pool for all: every process makes a context on the device
    pool = ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) if args.jobs > 1 else None
    for name in args.shapes:
        problem = Problem(SHAPES[name])
        products = 2 * problem.shape.tokens * problem.shape.top_k * problem.shape.hidden * problem.shape.inner
        for kernel in args.kernels or KERNELS:
            times = try_all(problem, name, kernel, settings(kernel), pool)
            best = times[0][1] if times else {}
            times += try_all(problem, name, kernel, (best | {"GROUP": group} for group in GROUPS), pool)
            times.sort(key=lambda entry: entry[0])
            ours, theirs = median_ms(problem.call(kernel, {})), None
            try:
                theirs = median_ms(problem.grouped_mm(kernel))
            except RuntimeError as error:  # a layout that this torch does not take
                console.print(f"F.grouped_mm: {error}", highlight=False, markup=False)
            flops = products * (2 if kernel in ("swiglu", "d_hidden", "d_gate_up") else 1)

            def line(label: str, ms: float, flops: int = flops) -> None:
                console.print(f"  {ms:8.3f} ms  {flops / ms / 1e9:5.0f} TFLOP/s  {label}", highlight=False)

            console.print(f"{name} {kernel}", highlight=False)
            for ms, setting in times[:BEST]:
                line(", ".join(f"{key}={entry}" for key, entry in setting.items()), ms)
            # what a weight gradient runs as is up to library_pays, too
            columns = problem.shape.inner if "swiglu" in kernel else problem.shape.hidden
            chosen = f": {configuration(kernel, torch.bfloat16, columns)}" if kernel in ROWS else ""
            line(f"in force{chosen}", ours)
            if theirs is not None:
                line("F.grouped_mm", theirs)
            document["results"].append(
                {"shape": name, "kernel": kernel, "in_force_ms": ours, "grouped_mm_ms": theirs, "settings": times}
            )
            save(document, path)
    if pool is not None:
        pool.shutdown()
