"""Train a small Llama on GSM8K three times and compare: dense, selective (backend "cggr"), random-token control.

The three runs start from the same weights and see the same batches. Whatever comes out is printed, also when
plain dense training is better or faster. Ctrl-C stops the run and reports what has been measured until then.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from batch_order import batch_order
from comparison import RunRecord, StepTimes, report, save
from gsm8k_data import pack, read_texts, train_tokenizer
from interrupt import Interrupt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import LlamaConfig, LlamaForCausalLM

import cggr_compile
from cggr_compile.compat import cpp_compiler

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Size:
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int


SIZES = {
    "nano": Size(512, 64, 2, 2, 1),
    "tiny": Size(2048, 128, 4, 4, 2),
    "small": Size(4096, 256, 6, 4, 2),
    "base": Size(8192, 512, 8, 8, 4),
    "135m": Size(8192, 576, 30, 9, 3),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    defaults = cggr_compile.Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="training steps of each run")
    parser.add_argument("--model-size", choices=SIZES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda trains in bfloat16 autocast")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "gsm8k", help="folder of train.jsonl, test.jsonl")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3, help="constant after a warm-up of a tenth of the steps")
    parser.add_argument("--evals", type=int, default=6, help="evaluations of the held-out loss during a run")
    parser.add_argument(
        "--eval-blocks", type=int, default=64, help="test blocks of those evaluations; the last is on all"
    )
    parser.add_argument("--timed-steps", type=int, default=15, help="steps that take turns, after the training")
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compiler", choices=("auto", "inductor", "eager"), default="auto", help="for all the runs")
    selective = parser.add_argument_group("selective run (see cggr_compile.Options)")
    selective.add_argument("--ratio", type=float, default=0.25, help="min_tokens_ratio, also of the control")
    selective.add_argument("--scoring", default=defaults.scoring)
    selective.add_argument("--selection", default=defaults.selection)
    selective.add_argument("--gradient", default=defaults.gradient, help="also of the control")
    selective.add_argument("--kv-gradient", default=defaults.kv_gradient, help="also of the control")
    args = parser.parse_args(argv)
    try:
        for _, options in runs(args):
            cggr_compile.Options.parse(options)
    except ValueError as error:
        parser.error(str(error))
    for name in ("steps", "batch_size", "evals"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    return args


def runs(args: argparse.Namespace) -> list[tuple[str, dict[str, Any] | None]]:
    """Name and backend options of every run; None is plain torch.compile."""
    common = {
        "min_tokens_ratio": args.ratio,
        "gradient": args.gradient,
        "kv_gradient": args.kv_gradient,
        "compiler": args.compiler,
        # the demo's models are small enough to be left dense on a GPU; it is there to show selection
        "launch_bound": "select",
    }
    folder = args.out.resolve() / "graphs"
    selective = {**common, "scoring": args.scoring, "selection": args.selection, "seed": args.seed}
    control = {**common, "scoring": "random", "selection": "random", "seed": args.seed + 1}
    return [
        ("dense", None),
        ("selective", {**selective, "dump_dir": str(folder / "selective")}),
        ("random control", {**control, "dump_dir": str(folder / "random_control")}),
    ]


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with random weights: the same ones at every call with the same seed."""
    size = SIZES[args.model_size]
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=args.seq_len,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def dense_backend(args: argparse.Namespace) -> str:
    """What plain torch.compile runs on: Inductor; without a C++ compiler no code generation, as for backend "cggr"."""
    if args.compiler == "eager" or (args.compiler == "auto" and args.device == "cpu" and cpp_compiler() is None):
        return "aot_eager"
    return "inductor"


def precision(device: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, blocks: torch.Tensor, args: argparse.Namespace) -> float:
    """Mean loss over all predicted tokens of ``blocks``, in evaluation mode, through the compiled model."""
    model.eval()
    losses = []
    for batch in blocks.split(args.batch_size):
        with precision(args.device):
            losses.append(model(input_ids=batch, labels=batch).loss.float())
    model.train()
    return float(torch.stack(losses).mean())


class Run:
    """One model with its optimizer, and the record of what it did."""

    def __init__(self, record: RunRecord, args: argparse.Namespace) -> None:
        self.record, self.args = record, args
        self.memory_before = torch.cuda.memory_allocated() if args.device == "cuda" else 0
        self.model = build_model(args).to(args.device)
        if record.options is None:
            self.model.compile(backend=dense_backend(args))
        else:
            self.model.compile(backend="cggr", options=record.options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
        warmup = max(1, args.steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / warmup))

    def step(self, batch: torch.Tensor, times: StepTimes) -> float:
        device = self.args.device
        start = now(device)
        with precision(device):
            loss = self.model(input_ids=batch, labels=batch).loss
        forward = now(device)
        loss.backward()
        backward = now(device)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        times.add(forward - start, backward - forward, now(device) - start)
        return float(loss.item())

    def train(
        self,
        batches: Sequence[torch.Tensor],
        held_out: torch.Tensor,
        progress: Progress,
        checkpoint: Callable[[], None],
        interrupt: Interrupt,
    ) -> None:
        """Train on ``batches``; call ``checkpoint`` after every evaluation. Selective runs: keep their metrics."""
        record, args, steps = self.record, self.args, len(batches)
        sample = held_out[: max(1, args.eval_blocks // args.batch_size) * args.batch_size]
        evaluate_at = {round(steps * i / args.evals) for i in range(args.evals + 1)}
        task = progress.add_task(record.name, total=steps, note="compiling")
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for step in range(steps + 1):
            interrupt.check()
            if step in evaluate_at:
                record.held_out.append((step, held_out_loss(self.model, sample, args)))
                if record.options is not None and step > 0:
                    record.metrics = cggr_compile.runtime(self.model).metrics()
                checkpoint()
            if step < steps:
                record.train_loss.append(self.step(batches[step], record.training))
            progress.update(task, completed=len(record.train_loss), note=_note(record))
        if args.device == "cuda":
            record.peak_memory_mb = (torch.cuda.max_memory_allocated() - self.memory_before) / 2**20
        record.final = held_out_loss(self.model, held_out, args)
        checkpoint()


def time_in_turns(
    trained: list[Run], batches: Sequence[torch.Tensor], progress: Progress, interrupt: Interrupt
) -> None:
    """Further steps of all the runs, one after the other in every round: the times that are fair to compare."""
    task = progress.add_task("timing", total=len(batches), note="steps in turns")
    for batch in batches:
        for run in trained:
            interrupt.check()
            run.step(batch, run.record.alternating)
        progress.advance(task)


def _note(record: RunRecord) -> str:
    loss = f"loss {record.train_loss[-1]:.3f}, " if record.train_loss else ""
    return f"{loss}held-out {record.held_out[-1][1]:.3f}"


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    size = SIZES[args.model_size]
    records: list[RunRecord] = []
    trained: list[Run] = []
    setup: dict[str, Any] = {
        "arguments": vars(args),
        "interrupted": False,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "dense_backend": dense_backend(args),
    }
    columns = (TextColumn("{task.description:>15}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        console.print(f"Reading {args.data} and training a tokenizer of {size.vocab} tokens", highlight=False)
        train_texts, test_texts = read_texts(args.data / "train.jsonl"), read_texts(args.data / "test.jsonl")
        tokenizer = train_tokenizer(train_texts, size.vocab)
        tokenizer.save(str(args.out / "tokenizer.json"))
        blocks = pack(train_texts, tokenizer, args.seq_len).to(args.device)
        held_out = pack(test_texts, tokenizer, args.seq_len)
        # whole batches only: one shape for every call
        held_out = held_out[: max(1, len(held_out) // args.batch_size) * args.batch_size].to(args.device)
        order = batch_order(len(blocks), args.batch_size, args.steps + args.timed_steps, args.seed)
        batches = [blocks[numbers] for numbers in order]
        parameters = sum(p.numel() for p in build_model(args).parameters())
        console.print(
            f"{parameters / 1e6:.1f} M parameters, {len(blocks)} blocks of {args.seq_len} tokens, "
            f"{len(held_out)} held-out blocks, {args.batch_size} blocks a step, {setup['device']}, "
            f"torch {torch.__version__} ({setup['dense_backend']})",
            highlight=False,
        )
        with (
            Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress,
            Interrupt() as interrupt,
        ):
            for name, options in runs(args):
                records.append(RunRecord(name, options))
                trained.append(Run(records[-1], args))
                trained[-1].train(
                    batches[: args.steps],
                    held_out,
                    progress,
                    lambda: save(records, setup, args.out / "results.json"),
                    interrupt,
                )
            time_in_turns(trained, batches[args.steps :], progress, interrupt)
    except KeyboardInterrupt:
        setup["interrupted"] = True
        console.print("\nInterrupted: this is what has been measured so far.")
    if records:
        report(records, setup, args.out, console)
    if len(records) > 1 and args.selection in ("random", "labels"):
        console.print(
            "- Both selective runs select at random here, with different seeds: their difference in loss is noise, "
            "that in time is the router's cost. --selection topk selects by score.",
            highlight=False,
        )
    console.print(f"Written to {args.out}: results.json, report.txt, loss.png, graphs/", highlight=False)
    return 130 if setup["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
