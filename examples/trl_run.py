"""What the examples with TRL's trainers share: their arguments, model and data, and what a run says at its end."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gsm8k_prompts import prompts_in_random_order
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import cggr_compile
from cggr_compile.integrations.transformers import CGGRCallback

GSM8K = Path(__file__).resolve().parent.parent / "data" / "gsm8k"


def parse_arguments(description: str | None, argv: Sequence[str] | None, name: str, lr: float) -> argparse.Namespace:
    """``name``: of the folder of what comes out; ``lr``: the default learning rate."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or name that transformers loads; None: SmolLM2-135M-Instruct, see smollm2.py")
    add("--out", type=Path, help=f"folder of the trained model; None: runs/{name}/cggr, or dense")
    add("--dense", action="store_true", help="train as TRL does without the callback")
    few = {} if cuda else {"compiler": "eager"}  # generating code for 30 layers takes longer than three steps
    add("--options", type=json.loads, default=few, help="options of the callback, as JSON")
    add("--steps", type=int, default=100 if cuda else 3, help="steps of the optimizer")
    add("--batch-size", type=int, default=8 if cuda else 2, help="sequences of a step, pairs for DPO")
    add("--shots", type=int, default=8 if cuda else 1, help="solved problems in front of each one")
    add("--length", type=int, default=2048 if cuda else 256, help="most tokens of a sequence; longer ones are left out")
    add("--lr", type=float, default=lr, help="learning rate")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for option, least in {"steps": 1, "batch_size": 1, "shots": 0, "length": 2}.items():
        if getattr(args, option) < least:
            parser.error(f"--{option.replace('_', '-')} must be at least {least}")
    if not isinstance(args.options, dict):
        parser.error('--options must be a JSON object, such as {"gradient": "exact"}')
    try:
        CGGRCallback(**args.options)
    except ValueError as error:
        parser.error(f"--options: {error}")
    args.out = args.out or Path("runs") / name / ("dense" if args.dense else "cggr")
    return args


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model, in float32, and tokenizer."""
    folder = args.model or smollm2(Path("runs/smollm2/model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def gsm8k(args: argparse.Namespace, tokenizer: Any, count: int) -> list[tuple[str, str]]:
    """``count`` prompts, solved problems and then one, and its answers, in at most ``args.length`` tokens each."""
    found: list[tuple[str, str]] = []
    for prompt, answer in prompts_in_random_order(GSM8K / "train.jsonl", args.shots, args.seed):
        pair = prompt, f" {answer}"
        if len(tokenizer("".join(pair)).input_ids) < args.length:  # the end takes one more
            found.append(pair)
        if len(found) == count:
            return found
    raise SystemExit(f"error: {len(found)} problems fit into --length {args.length}, {count} are needed")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of every trainer."""
    return {
        "output_dir": str(args.out),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.lr,
        "bf16": torch.cuda.is_available(),
        "seed": args.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
    }


class StepTimes(TrainerCallback):
    """Seconds of every step, its generation included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(_now() - self._start)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run(trainer: Any, args: argparse.Namespace) -> int:
    """Train, say what came of it, and write the model."""
    times = StepTimes()
    trainer.add_callback(times)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        f"{'Dense' if args.dense else 'Selective'}: {len(losses)} steps, loss {losses[0]:.4f} at the first and "
        f"{losses[-1]:.4f} at the last, {statistics.median(times.seconds):.2f} s a step (median; the first compiles)"
    )
    if not args.dense:
        found = cggr_compile.runtime(trainer.model).metrics()
        if found["level"] == "dense":
            print(f"Every token was back-propagated: {found['fallback_reason']}")
        else:
            print(f"selection={found['selection']}; gradient at {found['gradient_tokens']} positions of the last batch")
    trainer.save_model(str(args.out / "model"))
    print(f"Written: {args.out / 'model'}, for AutoModelForCausalLM.from_pretrained")
    return 0
