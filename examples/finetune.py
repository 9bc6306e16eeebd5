"""Fine-tune a causal language model on chats, back-propagating from the tokens of the answers only.

A plain training loop with one line more, made to be copied: see compile_model(). --dense trains with plain
torch.compile at the same settings, for comparison. Ctrl-C leaves a checkpoint, from which --resume goes on. What comes
out is in OUT/model, a folder that plain transformers loads, and in OUT/report.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoint
import torch
import transformers
from batch_order import batch_order
from chat_data import Example, collate, common_length, describe, encode, read_chats
from interrupt import Interrupt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from run_log import RunLog, table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import cggr_compile


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder or name that transformers loads")
    add("--train", type=Path, required=True, help='JSON lines: {"prompt": ..., "answer": ...} or {"messages": [...]}')
    add("--test", type=Path, help="such a file of held-out chats, to evaluate on")
    add("--out", type=Path, help="folder of what comes out; None: runs/finetune/cggr, or dense")
    add("--dense", action="store_true", help="train with plain torch.compile")
    add("--options", type=json.loads, default={}, help="options of the backend, as JSON, over backend_options()")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    add("--steps", type=int, help="steps of the optimizer; None: one pass over the data")
    add("--batch-size", type=int, default=8, help="sequences of a batch")
    add("--accumulate", type=int, default=1, help="batches of an optimizer step")
    add("--length", type=int, default=2048, help="most tokens of a sequence; longer ones lose the prompt's beginning")
    add("--lr", type=float, default=2e-4, help="highest learning rate; a cosine goes down to a twentieth")
    add("--warmup", type=float, default=0.05, help="share of the steps in which the learning rate grows")
    add("--weight-decay", type=float, default=0.01)
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--evals", type=int, default=4, help="evaluations during training")
    add("--eval-size", type=int, default=256, help="held-out chats of an evaluation")
    add("--save-every", type=int, default=500, help="steps from one checkpoint to the next")
    add("--seed", type=int, default=0, help="of the batches' order, the selection, dropout")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="cuda trains in bfloat16 autocast")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "accumulate", "evals", "eval_size", "save_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.length < 2:
        parser.error("--length must be at least 2: one token predicts the next")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if not isinstance(args.options, dict):
        parser.error('--options must be a JSON object, such as {"gradient": "exact"}')
    try:
        cggr_compile.Options.parse(backend_options(args, most_labels=1))
    except ValueError as error:
        parser.error(f"--options: {error}")
    args.out = args.out or Path("runs/finetune") / ("dense" if args.dense else "cggr")
    return args


def backend_options(args: argparse.Namespace, most_labels: int) -> dict[str, Any]:
    """The backend's options; ``most_labels``: of one sequence."""
    options = {
        "selection": "labels",
        "advance": "manual",  # a step of the selection is a step of the optimizer
        "seed": args.seed,
        "compiler": "auto",
        "cuda_graphs": args.device == "cuda",  # all batches have one size
        **args.options,
    }
    if options["selection"] == "labels":
        # the labels are the selection: no token has to be scored, and every label gets a slot, with the context before
        options = {"scoring": "random", **options}
        context = cggr_compile.Options.parse(options).context_rows
        options = {"max_selected": most_labels + context, **options}
    return options


def most_slots(options: dict[str, Any], length: int) -> int:
    """The positions of a sequence that have a slot."""
    most = options["max_selected"]
    return min(length, most if isinstance(most, int) else math.ceil(most * length))


def compile_model(model: Any, options: dict[str, Any], args: argparse.Namespace) -> None:
    """In place, so that the parameters keep their names."""
    if not args.dense:
        model.compile(backend="cggr", options=options)  # the one line
    elif options["compiler"] == "eager":
        model.compile(backend="aot_eager")
    else:
        # Inductor's own CUDA graphs overwrite a gradient that the next batch's should be added to
        replay = options["cuda_graphs"] and args.accumulate == 1
        model.compile(mode="reduce-overhead" if replay else None)


def share_of_rate(step: int, steps: int, warmup: int) -> float:
    """Of the highest learning rate: grows over ``warmup`` steps, then a cosine goes down to a twentieth."""
    return min(1.0, (step + 1) / warmup) * (0.525 + 0.475 * math.cos(math.pi * step / steps))


class Training:
    """A model, what trains it, and what was measured."""

    def __init__(self, model: Any, args: argparse.Namespace, length: int, padding: int) -> None:
        self.model, self.args, self.length, self.padding = model, args, length, padding
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True
        )
        steps, warmup = args.steps, max(1, round(args.warmup * args.steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: share_of_rate(step, steps, warmup)
        )
        self.log = RunLog()
        self.stored = {"model": model, "optimizer": self.optimizer, "schedule": self.schedule, "log": self.log}
        if not args.dense:
            self.stored["runtime"] = cggr_compile.runtime(model)

    def step(self, examples: Sequence[Example]) -> Tensor:
        """One step of the optimizer. Returns the mean loss of the answers' tokens, on the device: nothing waits."""
        total, count = torch.zeros((), device=self.args.device), sum(example.predicted for example in examples)
        for batch in self.batches(examples):
            if self.args.device == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            ids, labels = self.tensors(batch, self.length)
            with self.precision():
                loss = self.model(input_ids=ids, labels=labels, use_cache=False).loss
            # every token counts the same, in whichever batch it is
            loss = loss * (sum(example.predicted for example in batch) / count)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        if not self.args.dense:
            cggr_compile.runtime(self.model).step()
        return total

    @torch.no_grad()
    def held_out_loss(self, examples: Sequence[Example]) -> float:
        """Mean loss of the answers' tokens, in evaluation mode; not compiled, so that batches may have any size."""
        self.model.eval()
        total = 0.0
        for batch in self.batches(examples):
            ids, labels = self.tensors(batch, max(len(example.ids) for example in batch))
            with self.precision():
                loss = self.model.forward(input_ids=ids, labels=labels, use_cache=False).loss
            total += float(loss) * sum(example.predicted for example in batch)
        self.model.train()
        return total / sum(example.predicted for example in examples)

    def batches(self, examples: Sequence[Example]) -> list[Sequence[Example]]:
        size = self.args.batch_size
        return [examples[first : first + size] for first in range(0, len(examples), size)]

    def tensors(self, batch: Sequence[Example], length: int) -> tuple[Tensor, Tensor]:
        """ids and labels on the device, without waiting for it."""
        ids, labels = collate(batch, length, self.padding)
        if self.args.device == "cuda":
            ids, labels = ids.pin_memory(), labels.pin_memory()
        return ids.to(self.args.device, non_blocking=True), labels.to(self.args.device, non_blocking=True)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cuda", torch.bfloat16) if self.args.device == "cuda" else contextlib.nullcontext()


def train(
    training: Training, examples: Sequence[Example], held_out: Sequence[Example], file: Path, progress: Progress
) -> bool:
    """Train up to the last step, or to Ctrl-C: then there is a checkpoint in ``file``. Returns whether to the last."""
    args, log = training.args, training.log
    order = batch_order(len(examples), args.batch_size * args.accumulate, args.steps, args.seed)
    evaluate_at = {round(args.steps * number / args.evals) for number in range(args.evals + 1)} if held_out else set()
    look_every = 10 if args.device == "cuda" else 1  # steps; a look at the losses waits for the device
    losses: list[Tensor] = []
    first = len(log.losses)
    task = progress.add_task("dense" if args.dense else "cggr", total=args.steps, completed=first, note=log.note())
    training.model.train()
    with Interrupt(patient=True) as interrupt:
        for step in range(first, args.steps + 1):  # so many steps are done
            end = interrupt.requested or step == args.steps
            save = interrupt.requested or (step > first and step % args.save_every == 0)
            evaluate = step in evaluate_at and step not in dict(log.held_out)
            if losses and (end or save or evaluate or step % look_every == 0):
                log.add(losses, args.device)
                losses = []
                progress.update(task, completed=step, note=log.note())
            if save:
                checkpoint.save(file, training.stored, settings(args))
            if evaluate and not interrupt.requested:
                log.held_out.append((step, training.held_out_loss(held_out)))
                progress.update(task, note=log.note())
            if end:
                break
            if save or evaluate or step == first:
                log.start(args.device)
            batch = [examples[number] for number in order[step].tolist()]
            log.tokens.append(sum(len(example.ids) for example in batch))
            losses.append(training.step(batch))
    return len(log.losses) == int(args.steps)


def settings(args: argparse.Namespace) -> dict[str, str]:
    """What the losses of a run depend on."""
    free = ("out", "resume", "save_every", "test", "evals", "eval_size")
    return {name: str(value) for name, value in vars(args).items() if name not in free}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    positions = getattr(
        AutoConfig.from_pretrained(args.model).get_text_config(), "max_position_embeddings", args.length
    )
    if args.length > positions:
        sys.exit(f"error: --length {args.length}: this model has positions for {positions} tokens")
    per_step = args.batch_size * args.accumulate
    try:
        chats = read_chats(args.train)
        if args.steps is None:
            args.steps = max(1, len(chats) // per_step)
        # no others than the run will see have to become tokens
        seen = batch_order(len(chats), per_step, args.steps, args.seed).flatten()[: len(chats)]
        examples = encode([chats[number] for number in seen.tolist()], tokenizer, args.length)
        held_out = encode(read_chats(args.test)[: args.eval_size], tokenizer, args.length) if args.test else []
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    length = common_length(examples, args.length)
    say(f"{args.train}: {describe(examples, length)}.")

    labels = sorted(example.predicted for example in examples)
    options = backend_options(args, most_labels=min(length, -(-labels[-1] // 32) * 32))
    if not args.dense and options["selection"] == "labels":
        say(
            f"In each sequence {most_slots(options, length)} of {length} positions carry gradient. The longest answers "
            f"have {labels[-1]} tokens, all but one in a hundred at most {labels[len(labels) * 99 // 100]}: fewer "
            "positions (--options '{\"max_selected\": N}') are cheaper, and take a random part of longer answers."
        )

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    model.loss_type = "ForCausalLM"  # where the name of the model's class does not say so (GPT-2)
    compile_model(model, options, args)
    padding = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    training = Training(model, args, length, padding)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "checkpoint.pt"
    if args.resume:
        try:
            checkpoint.load(file, training.stored, settings(args))
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f"error: --resume: {error}")

    cpu = f"CPU, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if args.device == "cuda" else cpu
    say(
        f"{model.num_parameters() / 1e6:.1f} M parameters, {args.steps} steps of {per_step} sequences, {device}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}. The first step compiles."
    )
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        finished = train(training, examples, held_out, file, progress)

    setup: dict[str, Any] = {"settings": settings(args), "length": length, "device": device, "torch": torch.__version__}
    console.print(table("Plain torch.compile" if args.dense else 'Backend "cggr"', training.log.summary(args.device)))
    if not args.dense:
        metrics = cggr_compile.runtime(model).metrics()
        setup |= {"options": options, "metrics": metrics}
        if not metrics["matched"]:
            say(f"The graph was NOT rewritten, every token was back-propagated: {metrics['fallback_reason']}")
        if metrics["labels_overflow"]:
            say(
                f"{metrics['labels_overflow']} labels found no slot: a random part of their sequences carried gradient."
            )
    training.log.write(args.out / "report.json", setup, args.device)
    if not finished:
        say(f"Interrupted. The same command with --resume goes on from {file}.")
        return 130
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    file.unlink(missing_ok=True)
    say(f"Written: {args.out / 'model'}, for AutoModelForCausalLM.from_pretrained, and {args.out / 'report.json'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
