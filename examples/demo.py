"""``make demo``: what backend "cggr" gains where only answers have a loss, on two CPU cores within four minutes.

A small Llama is first trained on the problems of GSM8K, on every token and densely. From there four runs teach it to
write their solutions, behind prompts of several problems: dense; with the one line and its defaults; dense with half of
the batch; and a control with as many tokens at random. They take turns step by step, so that what else the machine does
is not charged to one of them. Whatever comes out is printed, also where it does not pay. Ctrl-C reports what has been
measured until then.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import train_gsm8k
import transformers
from batch_order import batch_order
from chat_data import describe
from compared_run import Run, compile_model, dense_backend
from comparison import RunRecord, report, save
from demo_arms import MOST, Arm, FineTuning, arms, control, take_turns
from demo_report import table, verdict
from interrupt import Interrupt
from prompt_task import Task, read_task
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from small_llama import SIZES, build_model

ROOT = Path(__file__).resolve().parent.parent
FROM_SCRATCH = "--from-scratch"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog=f"{FROM_SCRATCH} trains from random weights instead, with a loss on every token, as train_gsm8k.py "
        f"does; {FROM_SCRATCH} --help lists its arguments.",
    )
    add = parser.add_argument
    add("--steps", type=int, default=28, help="fine-tuning steps of the dense run")
    add("--pretrain-steps", type=int, default=72, help="steps before, of half batches")
    add("--model-size", choices=SIZES, default="mini")
    add("--data", type=Path, default=ROOT / "data" / "gsm8k", help="folder of train.jsonl and test.jsonl")
    add("--batch-size", type=int, default=4, help="sequences of a step, an even number")
    add("--seq-len", type=int, default=1024)
    add("--others", type=int, default=8, help="other problems in front of the one to solve")
    add("--most-labels", type=int, default=96, help="tokens of an answer; problems with longer ones are left out")
    add("--lr", type=float, default=1e-3, help="of the fine-tuning, constant after a warm-up of a tenth of the steps")
    add("--pretrain-lr", type=float, default=3e-3)
    add("--evals", type=int, default=3, help="evaluations of each run, up to the dense run's last step")
    add("--eval-size", type=int, default=32, help="held-out problems of an evaluation")
    add("--out", type=Path, default=Path("runs/demo"))
    add("--seed", type=int, default=0)
    add("--compiler", choices=("auto", "inductor", "eager"), default="auto", help="for all the runs")
    args = parser.parse_args(argv)
    for name, least in {"steps": 4, "pretrain_steps": 4, "evals": 1, "eval_size": 2, "most_labels": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if args.batch_size < 2 or args.batch_size % 2:
        parser.error("--batch-size must be an even number, at least 2: one run has half of it")
    return args


def make_task(args: argparse.Namespace) -> Task:
    return read_task(
        args.data,
        args.out,
        vocab=SIZES[args.model_size].vocab,
        length=args.seq_len,
        others=args.others,
        most_labels=args.most_labels,
        train=MOST * args.steps * args.batch_size,
        held_out=args.eval_size,
    )


def pretrain(task: Task, args: argparse.Namespace, progress: Progress, interrupt: Interrupt) -> Run:
    """The model that all start from, trained densely on every token. Half batches: that run uses the graph again."""
    model = build_model(SIZES[args.model_size], args.seq_len, args.seed)
    compile_model(model, None, dense_backend(args.compiler, "cpu"))
    run = Run(RunRecord("problems"), model, args.pretrain_lr, warmup=args.pretrain_steps // 10)
    bar = progress.add_task(run.record.name, total=args.pretrain_steps, note="compiling")
    for numbers in batch_order(len(task.blocks), args.batch_size // 2, args.pretrain_steps, args.seed):
        interrupt.check()
        loss = run.step((task.blocks[numbers], task.blocks[numbers]), run.record.training)
        run.record.train_loss.append(loss)
        progress.update(bar, advance=1, note=f"loss {loss:.3f}")
    return run


def start(
    arm: Arm, base: Run, weights: dict[str, Any], task: Task, args: argparse.Namespace, progress: Progress
) -> FineTuning:
    """A run from the pretrained weights, after its first step, which compiles."""
    bar = progress.add_task(arm.name, total=args.steps, note="compiling")
    record = RunRecord(arm.name, arm.options)
    if arm.options is None and arm.batch_size == args.batch_size // 2:
        model, record.compiled_in = base.model, base.record.training
    else:
        model = build_model(SIZES[args.model_size], args.seq_len, args.seed)
        compile_model(model, arm.options, dense_backend(args.compiler, "cpu"))
    model.load_state_dict(weights)
    run = FineTuning(arm, record, model, task, args, bar)
    run.evaluate()
    run.next_step()
    return run


def compare(
    task: Task,
    records: list[RunRecord],
    args: argparse.Namespace,
    progress: Progress,
    interrupt: Interrupt,
    checkpoint: Callable[[], None],
) -> None:
    """Pretrain, then all the runs up to equal steps, then some up to equal time; ``records`` get what they measure."""
    base = pretrain(task, args, progress, interrupt)
    weights = copy.deepcopy(base.model.state_dict())
    runs: list[FineTuning] = []

    def begin(arm: Arm) -> None:
        interrupt.check()
        runs.append(start(arm, base, weights, task, args, progress))
        records.append(runs[-1].record)

    for arm in arms(args):
        begin(arm)
    begin(control(runs[1], args))
    take_turns(runs, progress, interrupt, checkpoint)
    seconds = runs[0].record.seconds(args.steps)
    longer = [run for run in runs if run.arm.equal_time]
    for run in longer:
        run.extend(seconds)
    take_turns(longer, progress, interrupt, checkpoint)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if FROM_SCRATCH in arguments:
        arguments.remove(FROM_SCRATCH)
        return train_gsm8k.main(arguments)
    args = parse_arguments(arguments)
    begin = time.perf_counter()
    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    args.out.mkdir(parents=True, exist_ok=True)
    size = SIZES[args.model_size]
    records: list[RunRecord] = []
    setup: dict[str, Any] = {
        "arguments": vars(args),
        "interrupted": False,
        "equal_time": False,  # whether it came to the comparison at equal time
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": f"CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "dense_backend": dense_backend(args.compiler, "cpu"),
        "positions": args.batch_size * args.seq_len,
    }
    columns = (TextColumn("{task.description:>17}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        say(f"Reading {args.data} and training a tokenizer of {size.vocab} tokens")
        task = make_task(args)
        setup["held_out_labels"] = [example.predicted for example in task.held_out]
        parameters = sum(p.numel() for p in build_model(size, args.seq_len, args.seed).parameters())
        say(f"{describe(task.train, args.seq_len)}. No answer has more than {args.most_labels} tokens.")
        say(
            f"{parameters / 1e6:.1f} M parameters, {args.batch_size} sequences a step, {setup['device']}, "
            f"torch {torch.__version__} ({setup['dense_backend']}). First steps compile."
        )
        with (
            Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress,
            Interrupt() as interrupt,
        ):
            compare(
                task,
                records,
                args,
                progress,
                interrupt,
                lambda: save(records, setup, verdict(records, setup), args.out / "results.json"),
            )
        setup["equal_time"] = True
    except KeyboardInterrupt:
        setup["interrupted"] = True
        say("\nInterrupted: this is what has been measured so far.")
    setup["seconds"] = time.perf_counter() - begin
    if records:
        report(records, setup, table(records, setup), verdict(records, setup), args.out, console)
        say("One seed and a small model: longer runs and larger models may differ. `make finetune` trains a real one.")
        say(f"{setup['seconds']:.0f} s in all. Written to {args.out}: results.json, report.txt, loss.png.")
    return 130 if setup["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
