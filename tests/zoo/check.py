"""Trains a tiny model through the backend and compares it with itself run eagerly."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from reference import Picks, candidates, selected_loss, shift
from torch import Tensor, nn
from training import complaints
from zoo.sizes import LAYERS
from zoo.tiny import batch_of, model_of

import cggr_compile

RATIO = 0.5
EVERY = 1 - 1 / 1024  # a slot for every position, in a rewritten graph
MOST_PARAMETERS = 20_000_000
# Rounding of float32 in models of three layers stays below 1e-4; a wrong term moves a gradient by more than a percent.
TOLERANCE = 1e-3
_DENSE = "part of the backward still computes every position, correct but slower: "
Gradients = dict[str, Tensor]


class UnequalError(AssertionError):
    """The backend's loss or a gradient is not the reference's."""


def check(name: str, layers: int = LAYERS) -> dict[str, Any]:
    """What the backend makes of the tiny model ``name`` (``tiny.model_of``).

    The gradient ``exact`` is compared with eager autograd on the loss of the same positions, ``routed`` with the dense
    backward of the same graph (the option ``verify``); a dense graph with the unmodified model.

    Returns:
        ``status``: "right", "wrong" or "error", or, not for the backend to answer for, "eager" (it does not train
        without torch.compile) or "torch.compile" (it does with no backend); but for the first with ``why``.
        ``level``, ``cause``, ``reason``: what the runtime says. ``dense``: what of the layers' backward computes every
        position. ``error``: largest relative error of a gradient. ``seconds``: of all compilations.
    """
    row: dict[str, Any] = {"status": "right"}
    try:
        model = model_of(name, layers)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        if row["parameters"] > MOST_PARAMETERS:
            return {**row, "status": "eager", "why": "no small configuration"}
        batch = batch_of(name)
        output, eager = _trained(model, batch)
        if not all(torch.isfinite(t).all() for t in (output.loss, *eager.values())):
            return {**row, "status": "eager", "why": "loss or gradient is not finite"}
    except Exception as error:
        return {**row, "status": "eager", "why": _first_line(error)}
    start = time.perf_counter()
    try:
        _exact(model, batch, output, eager, row)
        if row["level"] == "routed":
            _routed(model, batch, row)
    except (UnequalError, cggr_compile.VerificationError) as error:
        row |= {"status": "wrong", "why": _first_line(error)}
    except Exception as error:
        row |= {"status": "error", "why": _first_line(error)}
        if why := _never_compiles(model, batch):
            row |= {"status": "torch.compile", "why": why}
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _exact(model: nn.Module, batch: dict[str, Tensor], output: Any, eager: Gradients, row: dict[str, Any]) -> None:
    target = _aligned(output, batch["labels"])
    with _compiled(model, ratio=EVERY if target is None else RATIO, gradient="exact") as (runtime, _):
        _trained(model, batch)  # compiling may draw random numbers
        got, ours = _trained(model, batch)
        metrics, picks = runtime.metrics(), None
        row |= {"level": metrics["level"], "reason": metrics["fallback_reason"]}
        cause = next((report.cause for report in reversed(runtime.reports) if report.training), None)
        row["cause"] = None if cause is None else cause.name
        if metrics["matched"] and target is not None:
            first = getattr(model.config, "prompt_length", 0)  # positions in front of the tokens have no logits
            picks = Picks(torch.where(runtime.selected < 0, -1, runtime.selected - first), runtime.weights)
    if picks is None:
        loss, wanted = output.loss, eager
    else:
        assert target is not None
        loss, wanted = _selected(model, batch, target, picks)
    error, worst = _largest(ours, wanted)
    row["error"] = float(f"{error:.1e}")
    if abs(float(got.loss.detach() - loss)) > TOLERANCE * abs(float(loss)):
        raise UnequalError(f"the loss is {float(got.loss.detach()):.6g}, the reference's {float(loss):.6g}")
    if not error <= TOLERANCE:
        raise UnequalError(f"the gradient of {worst} differs by {error:.1e}")


def _routed(model: nn.Module, batch: dict[str, Tensor], row: dict[str, Any]) -> None:
    with _compiled(model, ratio=RATIO, gradient="routed", verify=1) as (runtime, warned):
        _trained(model, batch)
        metrics = runtime.metrics()
        row["level"] = metrics["level"]
        row["verified"] = metrics["verify_max_error"]
    row["dense"] = [m.partition(_DENSE)[2] for m in warned if _DENSE in m]


def _never_compiles(model: nn.Module, batch: dict[str, Tensor]) -> str:
    """What goes wrong with a backend that runs graphs as they are; empty: nothing."""
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    try:
        _trained(model, batch)
    except Exception as error:
        return _first_line(error)
    finally:
        model._compiled_call_impl = None
    return ""


@contextlib.contextmanager
def _compiled(model: nn.Module, ratio: float, **options: Any) -> Iterator[tuple[Any, list[str]]]:
    """The model compiled with the backend: its runtime, and the warnings that come meanwhile."""
    torch._dynamo.reset()
    model.compile(
        backend="cggr",
        options=dict(min_tokens_ratio=ratio, scoring="random", selection="random", compiler="eager", **options),
    )
    try:
        with complaints() as messages:
            yield cggr_compile.runtime(model), messages
    finally:
        model._compiled_call_impl = None


def _trained(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Any, Gradients]:
    """The model's output and gradients; random numbers, where it draws some, are the same each time."""
    torch.manual_seed(5)
    output = model(**batch)
    return output, _gradients(model, output.loss)


def _gradients(model: nn.Module, loss: Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _aligned(output: Any, labels: Tensor) -> Tensor | None:
    """The target of each logit, [B, S]: the next label or its own, whichever the model's loss is of; None: neither.

    What a model adds to the cross-entropy, such as a loss of its experts' router, is small.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != labels.shape:
        return None
    loss = float(output.loss.detach())
    found = {abs(float(_mean(logits.detach(), t)) - loss): t for t in (shift(labels), labels)}
    nearest = min(found)
    return found[nearest] if nearest < 0.02 * loss and nearest < 0.5 * max(found) else None


def _mean(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten())


def _selected(model: nn.Module, batch: dict[str, Tensor], target: Tensor, picks: Picks) -> tuple[Tensor, Gradients]:
    """The eager model, with its cross-entropy taken at the selected positions, and all else that its loss adds."""
    torch.manual_seed(5)
    output = model(**batch)
    logits = output.logits.float()
    loss = output.loss - _mean(logits, target) + selected_loss(logits, target, picks, valid=candidates(target))
    return loss.detach(), _gradients(model, loss)


def _largest(ours: Gradients, wanted: Gradients) -> tuple[float, str]:
    """The largest relative error of a gradient and whose; small gradients are compared with the largest one."""
    scale = max(float(g.norm()) for g in wanted.values())
    found = [(0.0, "")]
    for name in ours.keys() | wanted.keys():
        zero = torch.zeros_like(ours[name] if name in ours else wanted[name])
        a, b = ours.get(name, zero), wanted.get(name, zero)
        found.append((float((a - b).norm() / (b.norm() + 1e-4 * scale)), name))
    return max(found)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:300]
