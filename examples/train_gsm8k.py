"""From random weights: train a small Llama on GSM8K three times: dense, selective (backend "cggr"), random tokens.

The three runs start from the same weights and see the same batches. Whatever comes out is printed, also when
plain dense training is better or faster. Ctrl-C stops the run and reports what has been measured until then.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from batch_order import batch_order
from compared_run import Run, compile_model, dense_backend, precision
from comparison import RunRecord, report, save
from gsm8k_data import pack, read_texts, train_tokenizer
from interrupt import Interrupt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scratch_report import table, verdict
from small_llama import SIZES, build_model

import cggr_compile

ROOT = Path(__file__).resolve().parent.parent


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


def start_memory(device: str) -> int:
    """Bytes that the runs before have on the device; the peak is counted from here."""
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory_mb(device: str, before: int) -> float | None:
    return (torch.cuda.max_memory_allocated() - before) / 2**20 if device == "cuda" else None


def make_run(record: RunRecord, args: argparse.Namespace) -> Run:
    model = build_model(SIZES[args.model_size], args.seq_len, args.seed).to(args.device)
    compile_model(model, record.options, dense_backend(args.compiler, args.device))
    return Run(record, model, args.lr, warmup=args.steps // 10, device=args.device)


def train(
    run: Run,
    batches: Sequence[torch.Tensor],
    held_out: torch.Tensor,
    args: argparse.Namespace,
    progress: Progress,
    checkpoint: Callable[[], None],
    interrupt: Interrupt,
) -> None:
    """Train on ``batches``; call ``checkpoint`` after every evaluation. Selective runs: keep their metrics."""
    record, steps = run.record, len(batches)
    sample = held_out[: max(1, args.eval_blocks // args.batch_size) * args.batch_size]
    evaluate_at = {round(steps * i / args.evals) for i in range(args.evals + 1)}
    task = progress.add_task(record.name, total=steps, note="compiling")
    for step in range(steps + 1):
        interrupt.check()
        if step in evaluate_at:
            record.held_out.append((step, held_out_loss(run.model, sample, args)))
            if record.options is not None and step > 0:
                record.metrics = cggr_compile.runtime(run.model).metrics()
            checkpoint()
        if step < steps:
            record.train_loss.append(run.step((batches[step], batches[step]), record.training))
        progress.update(task, completed=len(record.train_loss), note=_note(record))
    record.final = held_out_loss(run.model, held_out, args)
    checkpoint()


def time_in_turns(
    trained: list[Run], batches: Sequence[torch.Tensor], progress: Progress, interrupt: Interrupt
) -> None:
    """Further steps of all the runs, one after the other in every round: the times that are fair to compare."""
    task = progress.add_task("timing", total=len(batches), note="steps in turns")
    for batch in batches:
        for run in trained:
            interrupt.check()
            run.step((batch, batch), run.record.alternating)
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
        "dense_backend": dense_backend(args.compiler, args.device),
    }

    def checkpoint() -> None:
        save(records, setup, verdict(records), args.out / "results.json")

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
        parameters = sum(p.numel() for p in build_model(size, args.seq_len, args.seed).parameters())
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
                before = start_memory(args.device)
                trained.append(make_run(records[-1], args))
                train(trained[-1], batches[: args.steps], held_out, args, progress, checkpoint, interrupt)
                records[-1].peak_memory_mb = peak_memory_mb(args.device, before)
            time_in_turns(trained, batches[args.steps :], progress, interrupt)
    except KeyboardInterrupt:
        setup["interrupted"] = True
        console.print("\nInterrupted: this is what has been measured so far.")
    if records:
        report(records, setup, table(records), verdict(records), args.out, console)
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
