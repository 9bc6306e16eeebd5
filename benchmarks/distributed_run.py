"""Runs the arms of one shape in every process: compile and warm up each, then time them in turns."""

from __future__ import annotations

import argparse
import gc
import os
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from distributed_arms import SELECTIVE, Built, build_arm
from distributed_results import figures
from results import save
from rounds import MOST_RECOMPILES, WARM_UP
from shapes import SHAPES, make_batch
from timing import LEAD_IN, MB, milliseconds, stamp

import cggr_compile


class DistributedRun:
    """One shape; its result is appended to ``document``, which rank 0 saves as it grows.

    ``begin``: the monotonic clock when the program began, which ``--time-limit`` counts from.

    A sample is the slowest process's. ``unreduced`` and ``reduced`` are forward and backward without the optimizer,
    which has nothing to do where gradients are not reduced; ``step`` has it.
    """

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        document: dict[str, Any],
        say: Callable[[str], None],
        begin: float,
    ) -> None:
        self.name, self.args, self.document, self.say = name, args, document, say
        self.begin = begin
        self.shape, self.device = SHAPES[name], args.device
        self.dtype = getattr(torch, args.dtype or self.shape.dtype)
        ids, labels = make_batch(self.shape, device=self.device)
        self.batch = ids.roll(dist.get_rank(), 1), labels.roll(dist.get_rank(), 1)  # other tokens in every process
        self.built: dict[str, Built] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.result = {
            "shape": name,
            "world": dist.get_world_size(),
            "batch": ids.shape[0],
            "length": ids.shape[1],
            "dtype": str(self.dtype).removeprefix("torch."),
            "layers": args.layers,
            "compiler": args.compiler,
            "rounds": 0,
            "arms": self.records,
        }
        document["results"].append(self.result)

    def run(self) -> None:
        torch._dynamo.reset()
        chosen = [
            (arm, ratio) for arm in self.args.arms for ratio in (self.args.ratios if arm in SELECTIVE else [None])
        ]
        with torch._dynamo.config.patch(recompile_limit=MOST_RECOMPILES):
            for arm, ratio in chosen:
                label = arm if ratio is None else f"{arm} {ratio:g}"
                if self.late():
                    self.records[label] = {"status": "left out", "arm": arm, "ratio": ratio, "error": "no time left"}
                    continue
                self.attempt(label, self.warm_up, arm, ratio)
                if self.args.one_by_one:
                    self.rounds()
                    self.built.clear()
                    self.free()
            if not self.args.one_by_one:
                self.rounds()

    def rounds(self) -> None:
        for done in range(self.args.repeats):
            if self.late():
                break
            for label in list(self.built):
                self.attempt(label, self.measure)
            self.result["rounds"], self.result["load"] = done + 1, os.getloadavg()
            self.save()

    def late(self) -> bool:
        """Whether the time is up, by the first process's clock."""
        answer = [self.args.time_limit is not None and time.monotonic() - self.begin > self.args.time_limit]
        dist.broadcast_object_list(answer, src=0)
        return answer[0]

    def free(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def attempt(self, label: str, part: Callable[..., None], *arguments: Any) -> None:
        """``part(label)``; where it fails in any process, the arm is over in all."""
        error = ""
        try:
            part(label, *arguments)
        except Exception as failure:  # out of memory, a graph that was not rewritten
            error = f"{type(failure).__name__}: {failure}"
            self.records[label] = {"status": "failed", "error": error, "traceback": traceback.format_exc()}
        errors = [""] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        if any(errors):
            error = next(filter(None, errors))
            self.records[label] = {"traceback": "", **self.records.get(label, {}), "status": "failed", "error": error}
            self.built.pop(label, None)
            self.free()
            self.say(f"{self.name} {label}: {error}")
        self.save()

    def warm_up(self, label: str, arm: str, ratio: float | None) -> None:
        args = self.args
        built = build_arm(
            arm,
            self.shape,
            device=self.device,
            dtype=self.dtype,
            layers=args.layers,
            compiler=args.compiler,
            ratio=1.0 if ratio is None else ratio,
        )
        self.built[label] = built
        begin = time.perf_counter()
        loss = self.step(built)
        seconds = time.perf_counter() - begin
        for _ in range(WARM_UP):
            loss = self.step(built)
        if built.reduce is not None:
            built.reduce()
        record: dict[str, Any] = {"status": "ok", "arm": arm, "ratio": ratio, "compile_s": seconds, "loss": float(loss)}
        if arm in SELECTIVE:
            record["metrics"] = cggr_compile.runtime(built.model).metrics()
        record["sent"] = built.sent
        self.records[label] = {**record, "held_mb": built.held_mb, "peak_mb": None, "samples": {}}
        if self.device == "cuda":
            torch.cuda.synchronize()
            between = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step(built)
            torch.cuda.synchronize()
            self.records[label]["peak_mb"] = (torch.cuda.max_memory_allocated() - between) / MB
        self.say(f"{self.name} {label}: compiled in {seconds:.1f} s, loss {float(loss):.4f}")

    def measure(self, label: str) -> None:
        built, record = self.built[label], self.records[label]
        times = {"step": self.period(lambda: self.step(built))}
        if built.reduce is not None and built.unreduced is not None:
            times["reduced"] = self.period(lambda: self.passes(built))
            times["unreduced"] = self.period(lambda: self.passes(built, reduce=False))
            self.passes(built)  # what was not reduced is
            built.optimizer.zero_grad()
        if built.reduce is not None:
            times["reduction"] = self.period(built.reduce)
        slowest = torch.tensor(list(times.values()), dtype=torch.float64)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, slowest.tolist())
        for name, values in zip(times, zip(*gathered, strict=True), strict=True):
            record["samples"].setdefault(name, []).append(max(values))
        record |= figures(record["samples"])

    def period(self, function: Callable[[], Any]) -> float:
        """Milliseconds from the end of one to the end of the next, as in a training loop."""
        dist.barrier()
        for _ in range(LEAD_IN if self.device == "cuda" else 0):
            function()
        before = stamp(self.device)
        function()
        after = stamp(self.device)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return milliseconds(before, after)

    def passes(self, built: Built, *, reduce: bool = True) -> torch.Tensor:
        with built.around(), nullcontext() if reduce or built.unreduced is None else built.unreduced():
            loss = built.step(*self.batch)
            loss.backward()
        return loss.detach()

    def step(self, built: Built) -> torch.Tensor:
        loss = self.passes(built)
        built.optimizer.step()
        built.optimizer.zero_grad()
        return loss

    def save(self) -> None:
        if dist.get_rank() == 0:
            save(self.document, self.args.json)
