"""The runs that the demo compares: what each of them does, and how they take turns."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from batch_order import batch_order
from chat_data import collate
from compared_run import Batch, Run
from comparison import RunRecord
from interrupt import Interrupt
from prompt_task import Task, all_labelled, answer_losses
from rich.progress import Progress

import cggr_compile

MOST = 6  # times as many steps as the dense run: no run of equal time makes more


@dataclass(frozen=True)
class Arm:
    """A way of fine-tuning.

    Attributes:
        name: as it is shown.
        options: of the backend; None is plain torch.compile.
        batch_size: sequences of a step.
        prompts_too: whether the prompts have labels, too.
        equal_time: whether the run goes on until it has trained as long as the dense one.
    """

    name: str
    options: dict[str, Any] | None
    batch_size: int
    prompts_too: bool = False
    equal_time: bool = False


def arms(args: argparse.Namespace) -> list[Arm]:
    """Dense, with the one line, and dense with half of the batch; the control follows from the second."""
    options = {} if args.compiler == "auto" else {"compiler": args.compiler}  # the defaults are the point
    return [
        Arm("dense", None, args.batch_size),
        Arm("cggr", options, args.batch_size, equal_time=True),
        Arm("dense, half batch", None, args.batch_size // 2, equal_time=True),
    ]


def control(selective: FineTuning, args: argparse.Namespace) -> Arm:
    """As many positions as carried gradient in the ``selective`` run's last step, at random in prompts and answers."""
    rows = cggr_compile.runtime(selective.model).metrics()["gradient_tokens"]
    share = 1.0 if rows is None else rows / (args.batch_size * args.seq_len)
    options = {"selection": "random", "scoring": "random", "min_tokens_ratio": share, "seed": args.seed}
    return Arm("random tokens", {**options, **(selective.arm.options or {})}, args.batch_size, prompts_too=True)


class FineTuning(Run):
    """A run of one arm.

    Attributes:
        bar: its line of the progress display.
        until: steps that it makes. evaluate_at: steps after which it is evaluated.
    """

    def __init__(self, arm: Arm, record: RunRecord, model: Any, task: Task, args: argparse.Namespace, bar: Any) -> None:
        super().__init__(record, model, args.lr, warmup=args.steps // 10)
        self.arm, self.task, self.args, self.bar = arm, task, args, bar
        self.examples = [all_labelled(example) for example in task.train] if arm.prompts_too else task.train
        # the same sequences in the same order, whatever the size of a batch
        self.order = batch_order(len(task.train), arm.batch_size, MOST * args.steps, args.seed)
        self.until = args.steps
        self.evaluate_at = {round(args.steps * i / args.evals) for i in range(args.evals + 1)}

    def batch(self, step: int) -> Batch:
        some = [self.examples[number] for number in self.order[step].tolist()]
        return collate(some, self.args.seq_len, self.task.padding)

    def next_step(self) -> None:
        self.record.train_loss.append(self.step(self.batch(self.record.steps), self.record.training))

    def evaluate(self) -> None:
        """The held-out loss, and what the backend says of its last step."""
        sums = answer_losses(self.model, self.task.held_out, self.args.batch_size, self.task.padding)
        self.record.held_out.append((self.record.steps, sum(sums) / self.task.held_out_labels))
        self.record.held_out_sums.append(sums)
        if self.arm.options is not None and self.record.steps:
            self.record.metrics = cggr_compile.runtime(self.model).metrics()

    def note(self) -> str:
        """For the progress bar."""
        step = self.record.typical("step")
        return f"held-out {self.record.held_out[-1][1]:.3f}" + (f", {step:.2f} s a step" if step else "")

    def extend(self, seconds: float | None) -> None:
        """Go on for as many steps as fit into ``seconds`` of training, all in all; two more evaluations."""
        step, done = self.record.typical("step"), self.until
        if seconds is not None and step is not None:
            self.until = min(max(done, int(seconds / step)), MOST * self.args.steps)
            self.evaluate_at |= {(done + self.until) // 2, self.until}


def take_turns(
    runs: Sequence[FineTuning], progress: Progress, interrupt: Interrupt, checkpoint: Callable[[], None]
) -> None:
    """Every run up to its last step, in rounds of one step each; ``checkpoint`` is called after every evaluation."""
    while any(run.record.steps < run.until for run in runs):
        for run in runs:
            if run.record.steps < run.until:
                interrupt.check()
                run.next_step()
                if run.record.steps in run.evaluate_at:
                    run.evaluate()
                    checkpoint()
                progress.update(run.bar, completed=run.record.steps, total=run.until, note=run.note())
