"""Settings of the grouped products, tried one after the other on a CUDA device: ``moe.py --sweep``.

For every grouped product of ``cggr_compile/kernels`` and every shape: the ten fastest settings, the setting in
force, `F.grouped_mm` of the same product over rows that lie ready, and a dense product of as many FLOPs (both without
SwiGLU, gather or routing weights). Times are medians of the device's. Every setting's result is compared with
float32 products, in memory that was full of NaN; one that differs is named and left out. At the end the whole layer by
the fastest settings, beside those in force.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch
from machine import describe
from moe_arms import SHAPES, Shape
from moe_problem import KERNELS, Outcome, Problem
from moe_settings import GROUPS, Setting, settings
from results import machine_line, save
from rich.console import Console
from torch import Tensor

BEST = 10
TOLERANCE = 1e-2  # relative, in norm
Times = list[tuple[float, Setting]]


def median_ms(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=40, return_mode="median"))


@contextmanager
def poisoned() -> Iterator[None]:
    """PyTorch fills with NaN what it allocates."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def quiet() -> None:
    """Of a process that compiles: what Triton says of settings that it refuses."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def compile_ahead(name: str, kernel: str, setting: Setting) -> str:
    """In a process of its own: leaves the binary in Triton's cache. Few rows, but sizes that specialise alike."""
    shape = SHAPES[name]
    small = Shape(shape.hidden, shape.inner, 16, shape.top_k, 256)
    try:
        Problem(small).call(kernel, setting)()
        torch.cuda.synchronize()
    except Exception as error:  # too little shared memory, too few registers, or what Triton does not compile
        return f"{type(error).__name__}: {error}"[:100]
    return ""


def attempt(problem: Problem, kernel: str, setting: Setting, wanted: tuple[Tensor, ...]) -> float:
    """The largest relative difference, in norm, of the kernel's results."""
    with poisoned():
        got: Outcome = problem.call(kernel, setting)()
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True))


class Sweep:
    """The settings that are left to try: those that did not compile, or gave a wrong result, are named once."""

    def __init__(self, pool: Executor, console: Console) -> None:
        self.pool, self.console = pool, console

    def compile(self, todo: list[tuple[str, str, Setting]]) -> dict[tuple[str, str], list[Setting]]:
        """By shape and kernel, what compiles. All of it before anything is timed: the processes use the device."""
        left: dict[tuple[str, str], list[Setting]] = defaultdict(list)
        if not todo:
            return left
        errors = self.pool.map(compile_ahead, *zip(*todo, strict=True))
        for (name, kernel, setting), error in zip(todo, errors, strict=True):
            if error:
                self.console.print(f"{name} {kernel} {text(setting)}: {error}", highlight=False, markup=False)
            else:
                left[name, kernel].append(setting)
        return left

    def time(self, problem: Problem, kernel: str, found: list[Setting], wanted: Outcome) -> Times:
        """(milliseconds, setting) of those that give the right result."""
        times = []
        for setting in found:
            difference = attempt(problem, kernel, setting, wanted)
            if difference < TOLERANCE:
                times.append((median_ms(problem.call(kernel, setting)), setting))
            else:
                self.console.print(f"{kernel} {text(setting)}: WRONG, {difference:.1e} off", highlight=False)
        return times


def text(setting: Setting) -> str:
    short = {"num_warps": "w", "num_stages": "s"}
    flags = [key.lower() for key, entry in setting.items() if entry is True]
    tile = "x".join(str(setting[f"BLOCK_{axis}"]) for axis in "MNK" if f"BLOCK_{axis}" in setting)
    others = [
        f"{short.get(key, key)}={entry}"
        for key, entry in setting.items()
        if not isinstance(entry, bool) and not key.startswith("BLOCK")
    ]
    return " ".join([tile, *others, *flags])


def best(times: Times, gathered: bool) -> list[Setting]:
    """The fastest setting, if there is one, over rows that lie ready or not."""
    found = [entry for entry in times if entry[1].get("GATHERED", False) is gathered]
    return [min(found, key=lambda entry: entry[0])[1]] if found else []


def sweep(args: argparse.Namespace, console: Console) -> None:
    """Prints a list per kernel and shape, and writes all times to ``<json>-sweep.json``."""
    from moe_parts import parts, tuned_layer

    path = args.json.with_name(f"{args.json.stem}-sweep.json")
    document: dict[str, Any] = {"machine": describe("cuda"), "results": []}
    console.print(machine_line(document["machine"]), highlight=False)
    kernels = args.kernels or KERNELS
    # one pool for all: every process makes a context on the device
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), initializer=quiet) as pool:
        tried = Sweep(pool, console)
        left = tried.compile(
            [(name, kernel, s) for name in args.shapes for kernel in kernels for s in settings(kernel)]
        )
        console.print("compiled", highlight=False)
        for name in args.shapes:
            problem = Problem(SHAPES[name])
            wanted = {kernel: problem.reference(kernel) for kernel in kernels}
            for kernel in kernels:
                error = attempt(problem, kernel, {}, wanted[kernel])
                if not error < TOLERANCE:
                    raise RuntimeError(f"{kernel}: what is in force is {error:.1e} off")
            times = {kernel: tried.time(problem, kernel, left[name, kernel], wanted[kernel]) for kernel in kernels}
            bests = [(k, s) for k in kernels for ready in (True, False) for s in best(times[k], ready)]
            again = [(name, k, s | {"GROUP": group}) for k, s in bests if "BLOCK_M" in s for group in GROUPS]
            for (_, kernel), found in tried.compile(again).items():
                times[kernel] += tried.time(problem, kernel, found, wanted[kernel])
            del wanted
            for kernel in kernels:
                times[kernel].sort(key=lambda entry: entry[0])
                compared = {label: median_ms(call) for label, call in others(problem, kernel).items()}
                console.print(f"{name} {kernel}", highlight=False)
                for ms, setting in times[kernel][:BEST]:
                    line(console, problem, kernel, ms, text(setting))
                for ms, setting in [entry for entry in times[kernel] if not entry[1].get("GATHERED")][:2]:
                    line(console, problem, kernel, ms, f"best that gathers: {text(setting)}")
                for label, ms in compared.items():
                    line(console, problem, kernel, ms, label)
                document["results"].append({"shape": name, "kernel": kernel, **compared, "settings": times[kernel]})
                save(document, path)
            if not args.kernels:
                document["results"].append({"shape": name, "parts": parts(problem, console)})
                document["results"].append({"shape": name, "layer": tuned_layer(problem, times, console)})
                save(document, path)
            del problem


def others(problem: Problem, kernel: str) -> dict[str, Callable[[], Any]]:
    """What settings are compared with."""
    return {
        "in force": problem.call(kernel, {}),
        "F.grouped_mm": problem.grouped_mm(kernel),
        "dense": problem.dense(kernel),
    }


def line(console: Console, problem: Problem, kernel: str, ms: float, label: str) -> None:
    rate = problem.flops(kernel) / ms / 1e9
    console.print(f"  {ms:8.3f} ms  {rate:5.0f} TFLOP/s  {label}", highlight=False, markup=False)
