"""Runs the arms of one shape: compile and warm up each, check that the dense ones agree, then time them in turns."""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from agreement import check_dense, first_layer_gradient
from arms import BASELINES, DENSE, Step, build_arm
from kernel_times import profile_step
from results import save, summary
from shapes import SHAPES, build_model, make_batch
from timing import run_step
from torch import Tensor

import cggr_compile
from cggr_compile.options import OptionError

WARM_UP = 4  # steps after the compiling one; CUDA graphs are recorded in the first of them
FAILURES = (RuntimeError, OptionError)  # out of memory, compilation, a graph that was not rewritten


class ShapeRun:
    """One shape's model, batch and arms, and their result, which is appended to ``document`` and saved as it grows."""

    def __init__(
        self, name: str, args: argparse.Namespace, document: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        shape = SHAPES[name]
        dtype = args.dtype or shape.dtype
        torch._dynamo.reset()
        self.name, self.args, self.document, self.say = name, args, document, say
        self.model = build_model(shape, device=args.device, dtype=getattr(torch, dtype), layers=args.layers)
        self.parameters = list(self.model.parameters())
        self.batch = make_batch(shape, device=args.device)
        self.tokens = shape.batch * shape.length
        self.steps: dict[str, Step] = {}  # of the arms that work
        self.gradients: dict[str, list[Tensor]] = {}  # of the dense arms
        self.records: dict[str, dict[str, Any]] = {}
        self.result: dict[str, Any] = {
            "shape": name,
            "device": args.device,
            "batch": shape.batch,
            "length": shape.length,
            "layers": self.model.config.num_hidden_layers,
            "shortened": args.layers is not None,
            "parameters": sum(p.numel() for p in self.parameters),
            "dtype": dtype,
            "ratio": args.ratio,
            "compiler": args.compiler,
            "cuda_graphs": args.cuda_graphs,
            "rounds": 0,
            "arms": self.records,
        }
        document["results"].append(self.result)

    def run(self) -> None:
        """Everything, in order.

        Raises:
            Disagreement: between the dense arms; no rounds are run then.
        """
        for arm in self.args.arms:
            self.attempt(arm, self.warm_up)
            save(self.document, self.args.json)
        dense = [arm for arm in DENSE if arm in self.steps]
        check_dense({arm: self.records[arm]["loss"] for arm in dense}, self.gradients, self.result["dtype"])
        samples: dict[str, list[Any]] = {arm: [] for arm in self.steps}
        for done in range(self.args.repeats):
            for arm in list(self.steps):
                self.attempt(arm, self.measure, samples[arm])
            self.result["rounds"], self.result["load"] = done + 1, os.getloadavg()
            save(self.document, self.args.json)
        for arm in list(self.steps) if self.args.profile else ():
            self.attempt(arm, self.profile)

    def attempt(self, arm: str, part: Callable[..., None], *args: Any) -> None:
        """``part(arm)``; if it fails, the arm is over, its record says why, and its memory is free for the others."""
        try:
            part(arm, *args)
            return
        except FAILURES as error:
            self.records[arm] = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        self.steps.pop(arm, None)
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        self.say(f"{self.name} {arm}: {self.records[arm]['error']}")

    def warm_up(self, arm: str) -> None:
        """Compile, and a few steps more, whose times are the record's until the rounds replace them."""
        args = self.args
        step = self.steps[arm] = build_arm(
            arm,
            self.model,
            ratio=args.ratio,
            compiler=args.compiler,
            cuda_graphs=args.cuda_graphs,
            dump_dir=str(args.dump_dir / self.name / arm) if args.dump_dir else None,
        )
        before, begin = _counts(), time.perf_counter()
        run_step(step, self.batch, self.parameters, memory=False)
        seconds = time.perf_counter() - begin
        if arm in DENSE:
            self.gradients[arm] = first_layer_gradient(self.model)
        warm = [run_step(step, self.batch, self.parameters, memory=not args.cuda_graphs) for _ in range(WARM_UP)]
        counts = _counts()
        self.records[arm] = {
            "status": "ok",
            "loss": warm[-1].loss,
            "compile_s": seconds,
            "compile_cached": counts["cached"] > before["cached"],
            "cuda_graphs_skipped": counts["skipped"] - before["skipped"],
            **summary(warm[1:], self.tokens),
        }
        if arm not in BASELINES:
            runtime = cggr_compile.runtime(self.model)
            passes = runtime.reports[-1].passes
            self.records[arm] |= {
                "options": runtime.reports[-1].options,
                "metrics": runtime.metrics(),
                "passes": {entry.name: {"reason": entry.reason, **entry.details} for entry in passes},
                "pass_seconds": sum(entry.seconds for entry in passes),
            }
        skipped = self.records[arm]["cuda_graphs_skipped"]
        note = f", {skipped} graphs run without CUDA graphs" if skipped else ""
        self.say(f"{self.name} {arm}: compiled in {seconds:.1f} s, loss {warm[-1].loss:.4f}{note}")

    def measure(self, arm: str, samples: list[Any]) -> None:
        lead_in = self.args.device == "cuda"
        memory = not self.args.cuda_graphs
        samples.append(run_step(self.steps[arm], self.batch, self.parameters, lead_in=lead_in, memory=memory))
        self.records[arm] |= summary(samples, self.tokens)

    def profile(self, arm: str) -> None:
        machine, record, path = self.document["machine"], self.records[arm], self.args.json
        header = (
            f"{self.name}, {arm}, {self.result['dtype']}, {machine['device']}, {machine['torch']}\n"
            f"medians without the profiler: forward {record['forward']['median']:.2f} ms, "
            f"backward {record['backward']['median']:.2f} ms"
        )
        report = profile_step(self.steps[arm], self.batch, self.model, header)
        (path.parent / f"{path.stem}-{self.name}-{arm}-profile.txt").write_text(report)


def _counts() -> dict[str, int]:
    """Inductor's counts until now: graphs found in a cache, graphs that do not run as CUDA graphs."""
    counters = torch._dynamo.utils.counters
    cached = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    return {"cached": cached, "skipped": counters["inductor"]["cudagraph_skips"]}
