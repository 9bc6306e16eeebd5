"""What the tests of training semantics share: small models, what the runtime says, the comparison."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from models import SEQ, VOCAB, family, make_batch
from reference import Picks, Run, assert_same, backward, hf_reference, reference, shift
from torch import Tensor, nn

import cggr_compile

RATIO = 0.25
SLOTS = math.ceil(RATIO * SEQ)
Batch = dict[str, Any]


def as_on_an_accelerator(monkeypatch: Any) -> None:
    """Leave out what a step reads on the CPU only, where that waits for nothing."""
    monkeypatch.setattr("cggr_compile.passes.semantic.check_labels.reads_on_the_host", lambda device: False)
    monkeypatch.setattr("cggr_compile.ops.attention_rows._last_of", lambda rows: 10**6)
    monkeypatch.setattr("cggr_compile.readback.Readback.receive", lambda self: None)  # there it comes by itself


def small(name: str = "llama", **overrides: Any) -> nn.Module:
    layers = "n_layer" if name == "gpt2" else "num_hidden_layers"
    return family(name, **{layers: 2, **overrides})


def selected(model: Any) -> Tensor:
    return cggr_compile.runtime(model).selected.clone()


def picks(model: Any) -> Picks:
    """Of the last training forward, for the reference."""
    runtime = cggr_compile.runtime(model)
    return Picks(runtime.selected.clone(), runtime.weights.clone())


def metrics(model: Any) -> dict[str, Any]:
    return cggr_compile.runtime(model).metrics()


def check_against_reference(model: nn.Module, batch: Batch, **mode: str) -> Run:
    got = backward(model, model(**batch).loss)
    assert metrics(model)["matched"] is True, metrics(model)
    assert_same(got, hf_reference(model, batch, picks(model), **mode))
    return got


def gradient_of(model: Any) -> str:
    """What a step's gradient is at its level: without a stack of layers there is none to route."""
    return "exact" if metrics(model)["level"] == "loss" else "routed"


def assert_selected_or_dense(
    got: Run, model: nn.Module, batch: Batch, logits: Callable[[], Tensor], loss: Callable[[], Tensor]
) -> None:
    """``got`` is what the metrics claim: the selected loss as we define it, or the user's own."""
    if metrics(model)["matched"]:
        want = reference(model, logits, shift(batch["labels"]), picks(model), gradient=gradient_of(model))
        assert_same(got, want)
    else:
        assert_same(got, backward(model, loss()))


@contextlib.contextmanager
def complaints() -> Iterator[list[str]]:
    """Warnings that name the package, whether warned or logged."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                found.append(record.getMessage())

    handler, logger = Handler(), logging.getLogger("cggr_compile")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield found
        finally:
            logger.removeHandler(handler)
            found += [str(w.message) for w in caught if "cggr" in str(w.message).lower()]


def padded(side: str, *, size: int = 2, seq: int = SEQ, ignored_labels: bool = True) -> Batch:
    """The first sequence has 6 positions of padding: on one side, or scattered as holes."""
    batch: Batch = make_batch(size, seq)
    mask = torch.ones(size, seq, dtype=torch.long)
    where = {"right": slice(seq - 6, seq), "left": slice(0, 6), "holes": [1, 4, 5, 8, 11, 12]}[side]
    mask[0, where] = 0
    if ignored_labels:
        batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    return {**batch, "attention_mask": mask}


def cross_entropy_and(extra: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)) + extra(logits)

    return loss
