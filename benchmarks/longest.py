"""The longest sequence whose training step fits on the device: tried for, each length in a process of its own."""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from finetune_arms import FinetuneArms, build_trained
from results import NONE, save, text
from rich.table import Table
from shapes import SHAPES, make_batch
from timing import MB, run_step

CAUTION = 50  # the stride beside a prediction, as a part of it


@dataclass(frozen=True)
class Trial:
    """One length that was tried: forward and backward, no optimizer.

    peak_mb: most memory allocated, the model and its gradients included; CUDA only.
    free_mb: what the device had free before; CUDA only.
    seconds: what the trial took, with compilation and the start of its process.
    note: why it does not fit.
    """

    length: int
    fits: bool
    peak_mb: float | None = None
    free_mb: float | None = None
    step_ms: float | None = None
    seconds: float = 0.0
    note: str = ""


def search(
    attempt: Callable[[int], Trial],
    *,
    start: int,
    step: int,
    most: int | None = None,
    seconds: float = float("inf"),
) -> Iterator[Trial]:
    """Tries lengths, multiples of ``step``, until the longest one that fits is known to a ``step``, or time is over.

    From ``start`` on it doubles until something fails, then bisects. As soon as two lengths have fitted, memory is
    taken to grow linearly: next comes the length that should just fit, then its neighbourhood.

    ``most``: nothing longer is tried. ``seconds``: no trial begins that would end later if it took as long as the one
    before it.
    """
    begin, length, stride = time.monotonic(), start, step
    trials: list[Trial] = []
    while True:
        trials.append(attempt(length))
        yield trials[-1]
        low, high = bracket(trials)
        end = high if high is not None or most is None else most // step * step + step  # too long, as far as is known
        late = time.monotonic() - begin + trials[-1].seconds > seconds
        if late or (end is not None and end - low <= step):
            return
        guess = _predicted(trials, step)
        if guess is not None and low < guess and (end is None or guess < end):
            length, stride = guess, max(step, guess // (CAUTION * step) * step)
            continue
        length = 2 * low if guess is None else guess if guess > low else low + stride
        if high is not None:
            halfway = low + max(step, (high - low) // (2 * step) * step)
            length = halfway if guess is None else max(high - stride, halfway) if guess > low else min(length, halfway)
        length = length if end is None else min(length, end - step)
        stride *= 2


def bracket(trials: Sequence[Trial]) -> tuple[int, int | None]:
    """The longest length that fitted (0: none), and the shortest that did not (None: none)."""
    low = max((trial.length for trial in trials if trial.fits), default=0)
    return low, min((trial.length for trial in trials if not trial.fits), default=None)


def _predicted(trials: Sequence[Trial], step: int) -> int | None:
    """The longest length that should fit, by a line through the two longest that did."""
    fitting = sorted((trial for trial in trials if trial.fits and trial.peak_mb), key=lambda trial: trial.length)[-2:]
    if len(fitting) < 2 or fitting[1].free_mb is None:
        return None
    (one, two), room = fitting, fitting[1].free_mb
    slope = ((two.peak_mb or 0) - (one.peak_mb or 0)) / (two.length - one.length)
    return None if slope <= 0 else int((two.length + (room - (two.peak_mb or 0)) / slope) // step * step)


def run_trial(arm: str, shape_name: str, length: int, args: argparse.Namespace) -> Trial:
    """Two steps of one sequence of the shape's model, in this process. Its failure, whatever it is, is in the note."""
    begin = time.monotonic()
    cuda = args.device == "cuda"
    free = torch.cuda.mem_get_info()[0] / MB if cuda else None
    shape = dataclasses.replace(SHAPES[shape_name], batch=1, length=length)
    try:
        model = build_trained(shape, args)
        step = FinetuneArms(model, args, length=length).of(args.labelled, f"{shape_name}-{length}")[arm].build()
        batch, parameters = make_batch(shape, device=args.device, labelled=args.labelled), list(model.parameters())
        samples = [run_step(step, batch, parameters, memory=False) for _ in range(2)]
    except Exception as error:
        note = f"{type(error).__name__}: {error}"
        return Trial(length, False, free_mb=free, seconds=time.monotonic() - begin, note=note)
    peak = torch.cuda.max_memory_allocated() / MB if cuda else None
    return Trial(length, True, peak, free, samples[-1].step, time.monotonic() - begin)


def _in_new_process(arm: str, shape_name: str, length: int, args: argparse.Namespace) -> Trial:
    begin = time.monotonic()
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            trial = pool.submit(run_trial, arm, shape_name, length, args).result()
    except BrokenProcessPool as error:
        trial = Trial(length, False, note=f"the process died: {error}")
    return dataclasses.replace(trial, seconds=time.monotonic() - begin)


def longest(
    arm: str, shape_name: str, args: argparse.Namespace, document: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Searches for one arm; its result is appended to ``document["longest"]``, which has every trial."""
    trials: list[dict[str, Any]] = []
    result: dict[str, Any] = {"shape": shape_name, "arm": arm, "labelled": args.labelled, "context": args.context}
    document["longest"].append(result | {"trials": trials})
    # fragments of freed memory would make a failure of what fits
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    found = search(
        lambda length: _in_new_process(arm, shape_name, length, args),
        start=args.start,
        step=args.granularity,
        most=args.most,
        seconds=args.minutes * 60,
    )
    for trial in found:
        trials.append(dataclasses.asdict(trial))
        save(document, args.json)
        peak = f"{trial.peak_mb:.0f} MB, " if trial.peak_mb else ""
        outcome = f"{peak}step {trial.step_ms:.0f} ms" if trial.step_ms else trial.note.splitlines()[0]
        say(f"{shape_name} {arm} {trial.length}: {outcome}, tried for {trial.seconds:.0f} s")


def longest_table(results: Sequence[dict[str, Any]]) -> Table:
    """One row per search; "fails at" is open where time was over, or nothing failed."""
    table = Table(title="longest sequence that fits: one sequence, forward and backward", title_justify="left")
    for name in ("shape", "arm", "labels"):
        table.add_column(name)
    for name in ("longest", "fails at", "peak MB", "step ms", "tokens/s", "× fair"):
        table.add_column(name, justify="right")
    longest_of = {(r["shape"], r["arm"]): bracket(_trials(r))[0] for r in results}
    for result in results:
        trials = _trials(result)
        low, high = bracket(trials)
        best = next((trial for trial in trials if trial.length == low), Trial(0, False))
        fair = longest_of.get((result["shape"], "fair"))
        table.add_row(
            result["shape"],
            result["arm"],
            str(result["labelled"]),
            str(low or NONE),
            str(high or NONE),
            text(best.peak_mb, "{:.0f}"),
            text(best.step_ms, "{:.0f}"),
            text(1e3 * low / best.step_ms if best.step_ms else None, "{:.0f}"),
            text(low / fair if fair else None, "{:.2f}"),
        )
    return table


def _trials(result: dict[str, Any]) -> list[Trial]:
    return [Trial(**trial) for trial in result["trials"]]
