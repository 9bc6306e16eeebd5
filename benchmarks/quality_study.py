"""The runs that quality.py was asked for: which are left, how long they will take, and their results."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from machine import describe
from quality_arms import ARMS, DEFAULTS, Arm, as_dict
from quality_report import plot, swept, tables
from quality_run import SIZES, Trainer, build_model
from quality_text import Blocks, Corpus, few, gsm8k, load_corpus
from results import save
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from cggr_compile import Options
from cggr_compile.options import OptionError
from cggr_compile.schedule import rungs

BATCHES = {"scratch": [4096, 16384, 65536, 262144], "finetune": [8192], "prompted": [32768], "sft": [8192]}
SECONDS = {"scratch": 40.0, "finetune": 6.0, "prompted": 8.0, "sft": 6.0}
RATES = {"scratch": [1e-3, 2e-3, 4e-3]} | {tuned: [1e-4, 3e-4, 1e-3] for tuned in ("finetune", "prompted", "sft")}
COMPILE_S = {"cuda": 30.0, "cpu": 10.0}  # of one ratio, until it is known
FAILURES = (RuntimeError, OptionError)  # out of memory, compilation, a graph that was not rewritten


@dataclass(frozen=True)
class Job:
    """One run. ``sweep``: a short one, to choose the learning rate."""

    regime: str
    batch: int
    arm: str
    lr: float
    seed: int
    sweep: bool

    def done(self, results: list[dict[str, Any]]) -> bool:
        return any(all(r[key] == value for key, value in vars(self).items()) for r in results)


class Study:
    """All the runs that were asked for; their results, appended to the file as they come."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args, self.console = args, console
        self.begin = time.perf_counter()
        self.arms: dict[str, Arm] = {**ARMS, **args.extra}
        self.path = args.out / "quality.json"
        self.document: dict[str, Any] = {"machine": describe(args.device), "setup": {}, "arms": {}, "results": []}
        if self.path.exists():
            self.document = json.loads(self.path.read_text())
            if args.retry:
                self.document["results"] = [r for r in self.results if r["status"] == "ok"]
        self.corpus: Corpus | None = None
        self._texts: dict[str, tuple[Blocks, Blocks]] = {}

    @property
    def results(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.document["results"]
        return found

    def left(self) -> float:
        return float(self.args.time_limit - (time.perf_counter() - self.begin))

    def groups(self) -> Iterator[tuple[str, int, str]]:
        """What shares a compiled step, in the order it runs."""
        for regime in self.args.regimes:
            for batch in self.args.batches or BATCHES[regime]:
                for arm in (*(self.args.arms or DEFAULTS[regime]), *self.args.extra):
                    yield regime, batch, arm

    def jobs(self, regime: str, batch: int, arm: str) -> list[Job]:
        """What is left to do of a group: first the sweep, then, with its best rate, the seeds."""
        rates = self.args.lrs or RATES[regime]
        sweep = [Job(regime, batch, arm, lr, 0, True) for lr in rates] if len(rates) > 1 else []
        if waiting := [job for job in sweep if not job.done(self.results)]:
            return waiting
        tried = {lr: loss for lr, loss in swept(self.results, regime, batch, arm).items() if lr in rates}
        best = min(tried, key=lambda lr: tried[lr]) if sweep and tried else rates[0]
        found = [Job(regime, batch, arm, best, seed, False) for seed in range(self.args.seeds)]
        return [job for job in found if not job.done(self.results)]

    def failed(self, regime: str, batch: int, arm: str) -> bool:
        group = {"regime": regime, "batch": batch, "arm": arm}
        return any(r["status"] != "ok" and all(r[k] == v for k, v in group.items()) for r in self.results)

    def budget(self, job: Job) -> float:
        seconds = self.args.seconds or SECONDS[job.regime]
        return float(seconds * self.arms[job.arm].budget * (self.args.sweep_share if job.sweep else 1.0))

    def predicted(self, regime: str, batch: int, arm: str) -> float:
        """Seconds until a group is done: compiling, its runs, a tenth for evaluations."""
        jobs = self.jobs(regime, batch, arm)
        if not jobs or self.failed(regime, batch, arm):
            return 0.0
        runs = sum(map(self.budget, jobs))
        if jobs[0].sweep:
            runs += self.args.seeds * self.budget(Job(regime, batch, arm, 0.0, 0, False))
        return self.compile_s(regime, batch, arm) + 1.1 * runs

    def compile_s(self, regime: str, batch: int, arm: str) -> float:
        known = [r["compile_s"] for r in self.results if r["arm"] == arm and r["status"] == "ok"]
        if known:
            return float(max(known))
        options = self.arms[arm].resolved(usual_labels=1, dense_steps=100)
        return COMPILE_S[self.args.device] * (1 if options is None else len(rungs(Options.parse(options))))

    def plan(self) -> None:
        """What is going to run, and how long that is expected to take."""
        total = 0.0
        for regime, batch, arm in self.groups():
            seconds = self.predicted(regime, batch, arm)
            total += seconds
            jobs = self.jobs(regime, batch, arm)
            more = f", then {self.args.seeds} seeds" if jobs and jobs[0].sweep else ""
            what = f"{len(jobs)} runs{more}, about {seconds:.0f} s" if seconds else "done"
            self.console.print(f"{regime} {batch} {arm}: {what}", highlight=False)
        limit = (
            "" if self.args.time_limit == float("inf") else f"; this command stops after {self.args.time_limit:.0f} s"
        )
        self.console.print(f"About {total / 60:.1f} minutes in all{limit}", highlight=False)

    def prepare(self) -> None:
        """Text and tokenizer; refuses to add to results of another set-up.

        Raises:
            ValueError: naming what differs.
        """
        args = self.args
        roots = few() if args.tiny else None
        self.corpus = load_corpus(args.cache, vocab=SIZES[args.model].vocab, megabytes=args.megabytes, roots=roots)
        machine = describe(args.device)
        setup: dict[str, Any] = {name: machine[name] for name in ("device", "torch")}
        setup |= {name: vars(args)[name] for name in ("model", "length", "cuda_graphs", "compiler", "held_out")}
        setup |= {"seconds": args.seconds or SECONDS, "base": [args.base_seconds, args.base_lr]}
        setup |= {"shots": args.shots, "text": self.corpus.facts, "sweep_share": args.sweep_share}
        known = self.document["setup"] or setup
        if differ := [name for name in setup if known.get(name) != setup[name]]:
            told = ", ".join(f"{name}: {known.get(name)} there, {setup[name]} here" for name in differ)
            raise ValueError(f"{self.path} holds results of another set-up ({told}): choose another --out")
        names = {arm for _, _, arm in self.groups()}
        for name in sorted(names):
            entry = as_dict(self.arms[name])
            if self.document["arms"].setdefault(name, entry) != entry:
                raise ValueError(f"{self.path} holds results of another arm named {name}: choose another name or --out")
        self.document["setup"] = setup
        self.console.print(f"Text: {self.corpus.facts}", highlight=False)

    def texts(self, regime: str) -> tuple[Blocks, Blocks]:
        """Training and held-out blocks, on the device."""
        assert self.corpus is not None
        if regime not in self._texts:
            if regime == "scratch":
                train, held_out = (self.corpus.blocks(part, self.args.length) for part in ("train", "held_out"))
            else:
                how = {"answers_only": regime == "sft", "same_prompt": regime == "prompted"}
                shots = 0 if regime == "finetune" else self.args.shots
                train, held_out = (
                    gsm8k(part, self.corpus.tokenizer, self.args.length, shots=shots, **how)
                    for part in ("train", "test")
                )
                self.console.print(
                    f"{regime}: {train.tokens} training tokens, {train.share:.0%} of them with a label, "
                    f"at most {train.usual_labels / self.args.length:.0%} in 95 of 100 sequences",
                    highlight=False,
                )
            held_out = held_out.head(self.args.held_out)
            self._texts[regime] = train.to(self.args.device), held_out.to(self.args.device)
        return self._texts[regime]

    def trainer(self, regime: str, batch: int, options: dict[str, Any] | None) -> Trainer:
        train, held_out = self.texts(regime)
        return Trainer(
            options,
            SIZES[self.args.model],
            train,
            held_out,
            sequences=batch // self.args.length,
            cuda_graphs=self.args.cuda_graphs,
            compiler=self.args.compiler,
        )

    def start(self, regime: str, seed: int) -> dict[str, Tensor]:
        """Float32 weights to train from: random ones of the seed, or the base."""
        if regime != "scratch":
            return self.base()
        model = build_model(SIZES[self.args.model], self.args.length, device="cpu", seed=seed)
        return {name: p.detach() for name, p in model.named_parameters()}

    def base(self) -> dict[str, Tensor]:
        args = self.args
        assert self.corpus is not None
        name = (
            f"base-{args.model}-{args.length}-{args.base_seconds:g}-{args.base_lr:g}-{self.corpus.facts['digest']}.pt"
        )
        path = args.cache / name
        if not path.exists():
            batch = min(65536, len(self.texts("scratch")[0].ids) // 4 * args.length)
            trainer = self.trainer("scratch", batch, None)
            found = trainer.train(
                self.start("scratch", 0), lr=args.base_lr, budget=args.base_seconds, evaluations=4, seed=0
            )
            self.console.print(f"base: held-out loss {found['final']:.3f} after {found['steps']} steps")
            names = [name for name, _ in trainer.model.named_parameters()]
            weights = {n: m.detach().float().cpu() for n, m in zip(names, trainer.optimizer.masters, strict=True)}
            torch.save(weights, path)
        kept: dict[str, Tensor] = torch.load(path, weights_only=True)
        return kept

    def run(self) -> None:
        """Every group that fits into the time limit, in order."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            if any(regime != "scratch" for regime in self.args.regimes):
                self.base()
            for regime, batch, arm in self.groups():
                if self.failed(regime, batch, arm):
                    continue
                if (self.arms[arm].warmup or self.arms[arm].steps) and self.dense_steps(regime, batch) is None:
                    raise ValueError(f"{arm} is measured in steps of dense: the arm dense has to run before it")
                jobs = self.jobs(regime, batch, arm)
                if jobs and self.left() < self.compile_s(regime, batch, arm) + 1.1 * self.budget(jobs[0]):
                    self.console.print(f"Time limit: stopped before {regime} {batch} {arm}", highlight=False)
                    return
                if jobs:
                    self.group(regime, batch, arm, progress)
                if self.jobs(regime, batch, arm) and not self.failed(regime, batch, arm):
                    self.console.print(f"Time limit: stopped within {regime} {batch} {arm}", highlight=False)
                    return

    def group(self, regime: str, batch: int, arm: str, progress: Progress) -> None:
        """The runs of one arm, as many as the time allows; a failure is on record and the other arms go on."""
        task = progress.add_task(f"{regime} {batch} {arm}", total=1.0, note="compiling")
        job = self.jobs(regime, batch, arm)[0]
        trainer = None
        try:
            trainer = self.trainer(regime, round(batch * self.arms[arm].batch), self.options(regime, batch, arm))
            while jobs := self.jobs(regime, batch, arm):
                job = jobs[0]
                if self.left() < 1.1 * self.budget(job):
                    break
                progress.reset(task, note=f"lr {job.lr:g}" + (", sweep" if job.sweep else f", seed {job.seed}"))
                found = trainer.train(
                    self.start(regime, job.seed),
                    lr=job.lr,
                    budget=self.budget(job),
                    evaluations=self.args.evaluations,
                    seed=job.seed,
                    limit=self.limit(job),
                    progress=lambda share, loss: progress.update(task, completed=share, note=f"held-out {loss:.3f}"),
                )
                self.record(job, {"status": "ok", "compile_s": trainer.compile_s, **found})
        except FAILURES as error:
            self.record(job, {"status": "failed", "error": f"{type(error).__name__}: {error}"})
        finally:
            progress.remove_task(task)
            del trainer
            gc.collect()
            if self.args.device == "cuda":
                torch.cuda.empty_cache()

    def options(self, regime: str, batch: int, arm: str) -> dict[str, Any] | None:
        most = self.texts(regime)[0].usual_labels
        return self.arms[arm].resolved(usual_labels=most, dense_steps=self.dense_steps(regime, batch))

    def dense_steps(self, regime: str, batch: int) -> int | None:
        """What the arm `dense` made in its full time; None if it has not run."""
        group = {"regime": regime, "batch": batch, "arm": "dense", "sweep": False, "status": "ok"}
        steps = [r["steps"] for r in self.results if all(r[key] == value for key, value in group.items())]
        return round(mean(steps)) if steps else None

    def limit(self, job: Job) -> int | None:
        """The number of steps of a run that does not last for a time."""
        share = self.arms[job.arm].steps * (self.args.sweep_share if job.sweep else 1.0)
        return max(1, round(share * (self.dense_steps(job.regime, job.batch) or 0))) if share else None

    def record(self, job: Job, found: dict[str, Any]) -> None:
        self.results.append({**vars(job), **found})
        save(self.document, self.path)
        told = found.get("error") or (
            f"held-out loss {found['final']:.4f} after {found['seconds']:.2f} s, {found['steps']} steps"
        )
        what = "sweep" if job.sweep else f"seed {job.seed}"
        self.console.print(f"{job.regime} {job.batch} {job.arm} lr {job.lr:g} {what}: {told}"[:300], highlight=False)

    def report(self) -> None:
        if not self.results:
            return
        self.args.out.mkdir(parents=True, exist_ok=True)
        with (self.args.out / "quality.txt").open("w") as file:
            for console in (self.console, Console(file=file, width=180)):
                console.print(f"{self.document['setup']}", highlight=False)
                for table in tables(self.results):
                    console.print(table)
        plot(self.results, self.args.out / "quality.png")
