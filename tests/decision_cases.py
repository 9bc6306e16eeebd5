"""What test_decisions.py looks at: two processes under DistributedDataParallel that decide about their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import models
import torch
from ddp_cases import build
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import cggr_compile
from cggr_compile.causes import Cause
from cggr_compile.shared_readback import LAG, PERIOD
from cggr_compile.verify import VerificationError, Verifier

Batch = dict[str, torch.Tensor]
LABELS = {"context": 0, "selection": "auto"}
MEASURED = {
    "min_tokens_ratio": "auto",
    "selection": "random",
    "scoring": "random",
    "measure_every": 2,
    "variance_bound": 1.0,
}
CONFIDENT = {"dynamic_threshold": True, "scoring": "entropy", "selection": "random", "threshold_sensitivity": 1.0}
DECIDED = PERIOD + 3 * LAG + 2  # steps until figures of the second period have been received


def labelled(count: int, seed: int = 0, length: int = models.SEQ) -> Batch:
    """Two sequences with this many labels each, at their ends."""
    data = models.make_batch(seq=length, seed=seed)
    labels = data["input_ids"].clone()
    labels[:, : length - count] = models.IGNORE
    return {"input_ids": data["input_ids"], "labels": labels}


def train(
    batches: Sequence[Batch], options: dict[str, Any], context: Callable[[Any], Any] = lambda _: nullcontext()
) -> dict[str, Any]:
    """What was decided in every step."""
    model = build()
    model.compile(backend="cggr", options={"compiler": "eager", **options})
    wrapped = DistributedDataParallel(model)
    runtime = cggr_compile.runtime(model)
    steps = []
    with context(wrapped):
        for batch in batches:
            wrapped(**batch).loss.backward()
            model.zero_grad()
            steps.append(
                {
                    "ratio": runtime.metrics()["ratio"],
                    "selection": runtime.metrics()["selection"],
                    "slots": None if runtime.selected is None else runtime.selected.shape[1],
                    "growth": runtime.growth,
                    "added": runtime.metrics()["added_variance"],
                    "state": runtime.state_dict(),
                }
            )
    return {"steps": steps, "alone": runtime.agreement is None or runtime.agreement.alone}


@contextmanager
def each_alone() -> Iterator[None]:
    with mock.patch("cggr_compile.compilation.agreement_for", lambda *_: None):
        yield


def measured(rank: int) -> dict[str, Any]:
    return train([models.make_batch(seed=10 * rank + number) for number in range(3 * LAG + 4)], MEASURED)


def confident(rank: int) -> dict[str, Any]:
    return train([models.make_batch(seed=10 * rank + number) for number in range(DECIDED)], CONFIDENT)


def alone(of: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
    def run(rank: int) -> dict[str, Any]:
        with each_alone():
            return of(rank)

    return run


def growing(rank: int) -> dict[str, Any]:
    """Batches of one rank grow."""
    later = labelled(8 if rank else 2, seed=rank)
    return train([labelled(2), *[later] * DECIDED], LABELS)


def slots(rank: int) -> dict[str, Any]:
    """And a later batch of one rank, of another length, is nearly all labels."""
    later = labelled(11, length=12) if rank else labelled(2)
    return train([labelled(6 if rank else 2), later], LABELS)


def kind(rank: int) -> dict[str, Any]:
    return train([labelled(15 if rank else 3)], LABELS)


def no_labels(rank: int) -> dict[str, Any]:
    return train([labelled(0 if rank else 3)] * 2, LABELS)


def joined(rank: int) -> dict[str, Any]:
    """One rank's batches end before the other's."""
    batches = [models.make_batch(seed=number) for number in range(3 * LAG + 4)]
    return train(batches[: 3 if rank else None], MEASURED, lambda wrapped: Join([wrapped]))


def given_up(rank: int) -> dict[str, Any]:
    """Dynamo gives up on one rank, whose batches differ."""
    later = labelled(2, length=12) if rank else labelled(2)
    with torch._dynamo.config.patch(recompile_limit=1):
        found = train([labelled(2), *[later] * DECIDED], {**LABELS, "fallback": "silent"})
    return found


def refused(rank: int) -> dict[str, Any]:
    """One rank cannot rewrite its graph."""
    reason = Cause.UNALIGNED_TARGETS, "its targets are not known"
    refuse = mock.patch("cggr_compile.compilation.is_training", lambda *_: (True, reason)) if rank else nullcontext()
    with refuse:
        found = train([labelled(2)] * DECIDED, {**LABELS, "fallback": "silent"})
    return found


def fails(rank: int) -> dict[str, Any]:
    """One rank's second step does not stand the comparison."""
    compare, compared = Verifier.compare, []

    def wrong(*arguments: Any) -> Any:
        compared.append(compare(*arguments))
        return (1.0, "a weight") if rank and len(compared) == 2 else compared[-1]

    with mock.patch.object(Verifier, "compare", wrong):
        try:
            train([models.make_batch(seed=rank)] * 3, {"verify": 2, "scoring": "random", "selection": "random"})
        except VerificationError as error:
            return {"error": str(error), "compared": len(compared)}
    return {"error": "", "compared": len(compared)}


def learned(rank: int) -> dict[str, Any]:
    """Each draws by what it has learned itself, until they hear of each other."""
    batches = [models.make_batch(seed=10 * rank + number) for number in range(3 * LAG + 2)]
    return train(batches, {"scoring": "learned", "selection": "importance"})


CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "measured": measured,
    "measured, each alone": alone(measured),
    "confident": confident,
    "confident, each alone": alone(confident),
    "growing": growing,
    "growing, each alone": alone(growing),
    "slots": slots,
    "kind": kind,
    "kind, each alone": alone(kind),
    "no labels at first": no_labels,
    "joined": joined,
    "given up": given_up,
    "refused": refused,
    "verification fails": fails,
    "learned": learned,
}
SLOW = (
    *("confident", "confident, each alone", "growing, each alone", "kind, each alone"),
    *("slots", "joined", "refused", "no labels at first"),
)


def run(case: str, rank: int, _folder: Path) -> dict[str, Any]:
    return CASES[case](rank)
