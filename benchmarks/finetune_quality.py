"""What fine-tuning on answers behind prompts learns, at equal steps and in equal measured time, on a real model.

SmolLM2-135M-Instruct on GSM8K with solved problems in front (``--shots``), labels on the answers only. Every arm runs
in a process of its own (finetune_quality_worker.py), side by side on all devices, because what is learned does not
depend on what else runs; the time of a step is taken while all others wait.

1. Each arm's step is timed alone.
2. Every arm trains ``--steps`` steps at every learning rate, seed 0.
3. Every arm trains at its best rate with the other seeds (equal steps), and with every seed for as many steps as take
   the time of the first arm's (equal time).
4. ``--accuracy``: greedy answers to so many test problems, after the first seed's runs.

Arms are ``dense`` (the fair baseline of step.py), ``context-N`` (this backend with its defaults, and a context of N),
``context-N-stop``, ``exact``, ``random`` (control: half of the labels), each with ``:B`` for a batch of its own:
``dense:4`` is the half-batch control. ``--lora R`` trains adapters of rank R only. Results are in --out, as they come:
finetune_quality.json and a table. The same command again goes on from there.

    python benchmarks/finetune_quality.py --device cuda --cuda-graphs
    python benchmarks/finetune_quality.py --device cuda --cuda-graphs --arms dense:1,context-128:4 --steps 7000
    python benchmarks/finetune_quality.py --tiny                                      # the CPU rehearses
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from arguments import items
from finetune_quality_report import table
from machine import describe
from results import save
from rich.console import Console
from transformers import AutoTokenizer
from turns import cards

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))
from chat_data import Example, collate, encode, read_chats  # noqa: E402
from gsm8k_prompts import write_prompts  # noqa: E402

ARMS = ("dense", "dense:4", "context-0", "context-64", "context-128", "context-256", "context-400", "exact", "random")
ARM = re.compile(r"(dense|exact|random|context-\d+(-stop)?)(:\d+)?")
TINY = dict(
    compiler="eager",
    arms=["dense", "context-8"],
    shots=0,
    batch=2,
    length=96,
    steps=2,
    lrs=[1e-4],
    seeds=1,
    held_out=4,
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--cuda-graphs", action="store_true")
    add("--compiler", choices=("auto", "eager"), default="auto", help="eager: no generated code")
    add("--model", type=Path, help="folder of a Llama; default: SmolLM2-135M-Instruct (see examples/smollm2.py)")
    add("--arms", type=items(), default=list(ARMS), help=f"the first is the control; default: {','.join(ARMS)}")
    add("--equal-time", type=items(), help="arms that run for the first one's time, too, or none; default: the others")
    add("--shots", type=int, default=8, help="solved problems in a prompt")
    add("--batch", type=int, default=8)
    add("--length", type=int, default=2048)
    add("--steps", type=int, default=300)
    add("--lrs", type=items(float), default=[1e-4, 2e-4, 4e-4])
    add("--lora", type=int, metavar="RANK", help="train adapters of this rank only")
    add("--seeds", type=int, default=3)
    add("--held-out", type=int, default=1319, help="problems of an evaluation")
    add("--accuracy", type=int, default=0, help="problems answered after a run; 0: none")
    add("--out", type=Path, default=Path("runs/finetune-quality"))
    add("--time-limit", type=float, default=float("inf"), help="seconds, after which no run is begun")
    add("--tiny", action="store_true", help=f"changes the defaults to {TINY}")
    if "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    for arm in args.arms:
        if not ARM.fullmatch(arm):
            parser.error(f"--arms: {arm!r} is none of dense, exact, random, context-N, context-N-stop, with :BATCH")
    if len(set(args.arms)) < len(args.arms):
        parser.error("--arms names one twice")
    if args.equal_time is None:
        args.equal_time = args.arms[1:]
    elif args.equal_time == ["none"]:
        args.equal_time = []
    if unknown := sorted(set(args.equal_time) - set(args.arms[1:])):
        parser.error(f"--equal-time: {', '.join(unknown)}: not among --arms, or the first of them")
    for name, least in (("shots", 0), ("batch", 1), ("length", 2), ("steps", 1), ("seeds", 1), ("held_out", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if args.lora is not None and args.lora < 1:
        parser.error("--lora must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    return args


class Process:
    """A worker, and what was measured of its arm."""

    def __init__(self, arm: str, settings: dict[str, Any], log: Path, card: str) -> None:
        self.arm = arm
        name, _, batch = arm.partition(":")
        settings = {**settings, "arm": name} | ({"batch": int(batch)} if batch else {})
        self.batch = settings["batch"]
        script = Path(__file__).with_name("finetune_quality_worker.py")
        with log.open("w") as errors:
            self._worker = subprocess.Popen(
                [sys.executable, str(script), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": card},
            )
        self.log, self.best, self.seconds = log, 0.0, 0.0

    def answer(self) -> dict[str, Any]:
        """Waits for it.

        Raises:
            RuntimeError: the worker has ended; its log says why.
        """
        assert self._worker.stdout is not None
        line = self._worker.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.arm}: its worker ended; see {self.log}")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self._worker.stdin is not None
        self._worker.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._worker.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self._worker.kill()
        self._worker.wait()


class Study:
    """The runs of all arms; what is in its file already is not run again."""

    def __init__(self, args: argparse.Namespace, say: Callable[[str], None]) -> None:
        self.args, self.say, self.begin = args, say, time.perf_counter()
        self.document: dict[str, Any] = {"machine": describe(args.device), "settings": {}, "arms": {}, "runs": []}
        self._lock = threading.Lock()  # a thread waits for each worker
        self.path = args.out / "finetune_quality.json"
        if self.path.exists():
            self.document = json.loads(self.path.read_text())
        self.processes: list[Process] = []

    def run(self) -> None:
        try:
            self._start()
            self._time()
            self._equal_steps()
            if not self._out_of_time():
                self._rest()
        finally:
            for process in self.processes:
                process.end()
            self._save()

    def _start(self) -> None:
        args = self.args
        args.out.mkdir(parents=True, exist_ok=True)
        settings = prepare(args)
        self.document["settings"] = {name: str(value) for name, value in {**vars(args), **settings}.items()}
        self.say(f"{settings['labelled']:.1%} of the positions have a label")
        for arm, card in zip(args.arms, itertools.cycle(cards(args.device)), strict=False):
            self.processes.append(Process(arm, settings, args.out / f"{arm.replace(':', '-of-')}.log", card))
        for process, answer in self._each(self.processes, Process.answer):
            self.document["arms"].setdefault(process.arm, answer)
            self.say(f"{process.arm}: compiled in {answer['compile_s']:.0f} s")

    def _equal_steps(self) -> None:
        def sweep(process: Process) -> None:
            losses = {lr: self._train(process, lr, 0, self.args.steps, "steps") for lr in self.args.lrs}
            process.best = min(losses, key=lambda lr: losses[lr])
            if losses[process.best] < float("inf"):
                self.document["arms"][process.arm]["lr"] = process.best

        self._each(self.processes, sweep)

    def _time(self) -> None:
        for process in self.processes:  # one after the other: the device to itself
            facts = self.document["arms"][process.arm]
            if "step_s" not in facts:
                facts["step_s"] = process.ask("time", steps=5)["seconds"]
            process.seconds = facts["step_s"]
            self.say(f"{process.arm}: {1e3 * process.seconds:.1f} ms a step")
        self._save()

    def _rest(self) -> None:
        args, control = self.args, self.processes[0]

        def train(process: Process) -> None:
            equal = round(args.steps * control.seconds / process.seconds)
            for seed in range(args.seeds):
                self._train(process, process.best, seed, args.steps, "steps", answers=not seed)
                if process.arm in args.equal_time:
                    self._train(process, process.best, seed, equal, "time", answers=not seed)

        self._each(self.processes, train)

    def _train(self, process: Process, lr: float, seed: int, steps: int, equal: str, answers: bool = False) -> float:
        run = {"arm": process.arm, "batch": process.batch, "lr": lr, "seed": seed, "steps": steps, "equal": equal}
        wanted = answers and self.args.accuracy > 0
        for known in self.document["runs"]:
            if run.items() <= known.items() and (not wanted or "accuracy" in known):
                return float(known["loss"])
        if self._out_of_time():
            return float("inf")
        found = process.ask("train", lr=lr, seed=seed, steps=steps)
        if wanted:
            found |= process.ask("accuracy", count=self.args.accuracy)
        with self._lock:
            self.document["runs"].append(run | found)
            self._save()
        self.say(f"{process.arm}, equal {equal}, lr {lr:g}, seed {seed}: {steps} steps, {found['loss']:.4f}")
        return float(found["loss"])

    def _each(self, processes: Sequence[Process], do: Callable[[Process], Any]) -> list[tuple[Process, Any]]:
        """All of them at the same time; one that fails is left out from then on."""

        def attempt(process: Process) -> Any:
            try:
                return do(process)
            except (RuntimeError, OSError) as error:
                self.say(str(error))
                self.document["arms"].setdefault(process.arm, {})["error"] = str(error)
                return error

        with ThreadPoolExecutor(len(processes)) as pool:
            answers = list(zip(processes, pool.map(attempt, processes), strict=True))
        alive = [(process, answer) for process, answer in answers if not isinstance(answer, Exception)]
        self.processes = [process for process, _ in alive]
        if not alive or alive[0][0].arm != self.args.arms[0]:
            raise RuntimeError(f"{self.args.arms[0]}, the control, has failed")
        return alive

    def _out_of_time(self) -> bool:
        return bool(time.perf_counter() - self.begin > self.args.time_limit)

    def _save(self) -> None:
        save(self.document, self.path)


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Writes prompts and token sequences once, for all workers; their settings."""
    if args.model is None:
        from smollm2 import smollm2

        args.model = smollm2(args.out / "model")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, test = write_prompts(ROOT / "data" / "gsm8k", args.out / "prompts", args.shots)
    examples = encode(read_chats(train), tokenizer, args.length)
    held_out = encode(read_chats(test)[: args.held_out], tokenizer, args.length)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    data = {name: blocks(some, args.length, padding) for name, some in (("train", examples), ("test", held_out))}
    torch.save(data, args.out / "data.pt")
    labels = mean(example.predicted for example in examples)
    return {
        "model": str(args.model),
        "data": str(args.out / "data.pt"),
        "prompts": str(test),
        "labelled": labels / args.length,
        "half_of_labels": f"{labels / args.length / 2:.4f}",
        "device": args.device,
        "batch": args.batch,
        "compiler": args.compiler,
        "cuda_graphs": args.cuda_graphs,
        "lora": args.lora,
    }


def blocks(examples: Sequence[Example], length: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, labels = collate(examples, length, padding)
    return ids.int(), labels.int()


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    console = Console(width=max(150, Console().width))

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    study = Study(args, say)
    try:
        study.run()
    except (RuntimeError, KeyboardInterrupt) as error:
        say(f"Stopped: {error}")
    console.print(table(study.document))
    return int(any("error" in arm for arm in study.document["arms"].values()))


if __name__ == "__main__":
    sys.exit(main())
