"""Runs the arms of one shape: compile and warm up each, check that the dense ones agree, then time them in turns."""

from __future__ import annotations

import argparse
import functools
import gc
import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from agreement import check_dense, first_layer_gradient
from arms import DENSE, FLASH, SELECTIVE, Step, build_arm, labels, with_flash_attention
from kernel_times import profile_step
from results import save, summary
from shapes import SHAPES, build_model, make_batch
from timing import run_step
from torch import Tensor
from transformers import LlamaForCausalLM

import cggr_compile

WARM_UP = 4  # steps after the compiling one; CUDA graphs are recorded in the first of them
MOST_RECOMPILES = 64  # arms share a model, and so Dynamo's count for its code


class Unavailable(Exception):
    """An arm cannot run here: a package or an option is missing."""


@dataclass(frozen=True)
class Arm:
    """One way of computing the step.

    build: makes it; may raise Unavailable.
    selective: compiled by backend="cggr", which reports on it.
    same: what must equal the first dense arm's, of "loss" and "gradient"; where it does not, the arm has failed. (Where
        one of the dense arms of ``arms.DENSE`` differs, nothing can be compared, and the run ends.)
    model: once it is built, the model that it trains; None where that is the run's.
    """

    build: Callable[[], Step]
    selective: bool = False
    same: tuple[str, ...] = ()
    model: Callable[[], LlamaForCausalLM] | None = None


def step_run(name: str, args: argparse.Namespace, document: dict[str, Any], say: Callable[[str], None]) -> ShapeRun:
    """The run of step.py for one shape."""
    shape = SHAPES[name]
    torch._dynamo.reset()
    model = build_model(shape, device=args.device, dtype=getattr(torch, args.dtype or shape.dtype), layers=args.layers)
    flash = functools.cache(functools.partial(with_flash_attention, model))
    arms = {}
    for label, (arm, ratio) in labels(args.arms, args.ratio).items():
        dump_dir = str(args.dump_dir / name / label) if args.dump_dir else None
        settings = {"compiler": args.compiler, "cuda_graphs": args.cuda_graphs, "dump_dir": dump_dir}
        trained = flash if arm in FLASH else None
        build = functools.partial(_build, arm, trained or (lambda: model), ratio=ratio, **settings)
        arms[label] = Arm(build, selective=arm in SELECTIVE, model=trained)
    batch = make_batch(shape, device=args.device)
    ratios = ", ".join(f"{ratio:g}" for ratio in args.ratio)
    return ShapeRun(name, arms, model, batch, args, document, say, {"ratio": ratios})


def _build(arm: str, model: Callable[[], LlamaForCausalLM], **settings: Any) -> Step:
    return build_arm(arm, model(), **settings)


class ShapeRun:
    """One model, one batch, their arms, and the result, which is appended to ``document`` and saved as it grows.

    ``facts`` join the result: what sets it apart from others of the same shape.
    """

    def __init__(
        self,
        name: str,
        arms: Mapping[str, Arm],
        model: LlamaForCausalLM,
        batch: tuple[Tensor, Tensor],
        args: argparse.Namespace,
        document: dict[str, Any],
        say: Callable[[str], None],
        facts: Mapping[str, Any],
    ) -> None:
        self.name, self.arms, self.model, self.batch = name, arms, model, batch
        self.args, self.document, self.say = args, document, say
        self.parameters = list(model.parameters())
        self.tokens = batch[0].numel()
        self.steps: dict[str, Step] = {}  # of the arms that work
        self.gradients: dict[str, list[Tensor]] = {}  # of the arms that are compared
        self.records: dict[str, dict[str, Any]] = {}
        self.result: dict[str, Any] = {
            "shape": name,
            "device": args.device,
            "batch": batch[0].shape[0],
            "length": batch[0].shape[1],
            "layers": model.config.num_hidden_layers,
            "shortened": args.layers is not None,
            "parameters": sum(p.numel() for p in self.parameters),
            "dtype": str(model.dtype).removeprefix("torch."),
            **facts,
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
        with torch._dynamo.config.patch(recompile_limit=MOST_RECOMPILES):
            self._run()

    def _run(self) -> None:
        for arm in self.arms:
            self.attempt(arm, self.warm_up)
            save(self.document, self.args.json)
        dense = [arm for arm in DENSE if arm in self.steps]
        check_dense({arm: self.records[arm]["loss"] for arm in dense}, self.gradients, self.result["dtype"])
        for arm in list(self.steps) if dense else ():
            self.attempt(arm, self.compare, dense[0])
        samples: dict[str, list[Any]] = {arm: [] for arm in self.steps}
        for done in range(self.args.repeats):
            for arm in list(self.steps):
                self.attempt(arm, self.measure, samples[arm])
            self.result["rounds"], self.result["load"] = done + 1, os.getloadavg()
            save(self.document, self.args.json)
        for arm in list(self.steps) if self.args.profile else ():
            self.attempt(arm, self.profile)
        save(self.document, self.args.json)

    def attempt(self, arm: str, part: Callable[..., None], *args: Any) -> None:
        """``part(arm)``; if it fails, the arm is over, its record says why, and its memory is free for the others."""
        try:
            part(arm, *args)
            return
        except Unavailable as error:
            self.records[arm] = {"status": "unavailable", "error": str(error)}
        except Exception as error:  # out of memory, a graph that was not rewritten, whatever a peer raises
            message = f"{type(error).__name__}: {error}"
            self.records[arm] = {"status": "failed", "error": message, "traceback": traceback.format_exc()}
        self.steps.pop(arm, None)
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        self.say(f"{self.name} {arm}: {self.records[arm]['error']}")

    def warm_up(self, arm: str) -> None:
        """Compile, and a few steps more, whose times are the record's until the rounds replace them."""
        args = self.args
        step = self.steps[arm] = self.arms[arm].build()
        before, begin = _counts(), time.perf_counter()
        run_step(step, self.batch, self.parameters, memory=False)
        seconds = time.perf_counter() - begin
        if arm in DENSE or "gradient" in self.arms[arm].same:
            self.gradients[arm] = first_layer_gradient(self.model)
        warm = [run_step(step, self.batch, self.parameters, memory=not args.cuda_graphs) for _ in range(WARM_UP)]
        counts = _counts()
        self.records[arm] = {
            "status": "ok",
            "loss": warm[-1].loss,
            "compile_s": seconds,
            "compile_cached": counts["cached"] > before["cached"] or counts["captured"] == before["captured"],
            "cuda_graphs_skipped": counts["skipped"] - before["skipped"],
            **summary(warm[1:], self.tokens),
        }
        if self.arms[arm].selective:
            trained = self.arms[arm].model
            runtime = cggr_compile.runtime(self.model if trained is None else trained())
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

    def compare(self, arm: str, dense: str) -> None:
        """Raises Disagreement where the arm must be like ``dense``, and is not."""
        same = self.arms[arm].same
        if not same:
            return
        losses = {name: self.records[name]["loss"] for name in (dense, arm)}
        gradients = self.gradients if "gradient" in same else dict.fromkeys(losses, self.gradients[dense])
        check_dense(losses, gradients, self.result["dtype"])

    def measure(self, arm: str, samples: list[Any]) -> None:
        lead_in = self.args.device == "cuda"
        memory = not self.args.cuda_graphs
        before = _counts()["captured"]
        samples.append(run_step(self.steps[arm], self.batch, self.parameters, lead_in=lead_in, memory=memory))
        if _counts()["captured"] > before:
            raise RuntimeError("compiled again after its warm-up: another arm made Dynamo forget it")
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
    """Until now: graphs that Dynamo captured, graphs that Inductor found in a cache, or did not run as CUDA graphs."""
    counters = torch._dynamo.utils.counters
    cached = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    skipped = counters["inductor"]["cudagraph_skips"]
    return {"captured": counters["stats"]["unique_graphs"], "cached": cached, "skipped": skipped}
