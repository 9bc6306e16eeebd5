"""``advise``: which options pay for this model and these batches, measured where it runs; or that none do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from cggr_compile import compat
from cggr_compile.gradient_concentration import added_variance, concentration, token_gradients
from cggr_compile.options import FEW_LABELS, Options
from cggr_compile.trial import Batch, Trial, dense_trial, selective_trial

# What an advice has to win at least, in time for a gradient of the same variance.
WORTH = 0.95
MIB = 2**20


@dataclass(frozen=True)
class Candidate:
    """A way to train, beside dense steps with all of the batch.

    Attributes:
        name: for people. options: of the backend; None: dense.
        level: what the backend made of it. reason: why, in a sentence.
        step: its time as a share of the dense step's. memory: likewise, of what is kept for the backward pass.
        variance: of its gradient, as a multiple of the dense one's; gradients of tokens are taken to be independent.
            What ``gradient="routed"`` leaves out is no variance and not in it.
    """

    name: str
    options: dict[str, Any] | None
    level: str
    reason: str
    step: float
    memory: float
    variance: float

    @property
    def cost(self) -> float:
        """Time for a gradient of the dense one's variance, as a share of the dense step's."""
        return self.step * self.variance


@dataclass(frozen=True)
class Advice:
    """What :func:`advise` has measured; prints as five lines.

    Attributes:
        label_share: share of positions that have a label.
        concentration: (mean g)^2 / mean g^2 of the labelled tokens, g = |softmax - onehot|.
        dense_seconds: of a step.
        dense_bytes: kept for the backward pass.
        half: the dense control, half of the batch a step; None where it has one sequence.
        candidates: what was tried.
        options: to give the backend; None: stay dense.
        reason: why, in a sentence.
    """

    label_share: float
    concentration: float
    dense_seconds: float
    dense_bytes: int
    half: Candidate | None
    candidates: tuple[Candidate, ...]
    options: dict[str, Any] | None
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        says = "can" if self.concentration < 0.5 else "cannot"
        lines = [
            f"{self.label_share:.1%} of the positions have a label; concentration of their gradients "
            f"{self.concentration:.2f}: a quarter by importance {says} beat half of the batch",
            f"dense: {1e3 * self.dense_seconds:.1f} ms a step, {self.dense_bytes / MIB:.1f} MiB kept for the backward"
            + (f"; half of the batch: {_figures(self.half)}" if self.half else ""),
        ]
        lines += [f"{one.name}: {_figures(one)}" for one in self.candidates]
        lines.append(f"advice: {self.reason}")
        return "\n".join(lines)

    __repr__ = __str__


def advise(
    model: Module,
    batch: Batch | Sequence[Batch],
    *,
    options: Mapping[str, Any] | None = None,
    steps: int = 5,
) -> Advice:
    """Measure on a few batches whether the backend pays, and with which options.

    Dense steps, those of half of the batch and those of two candidates are compiled and timed, on the model's device,
    under the autocast in force. That takes minutes for a large model, and is best done in a process of its own.
    Weights, gradients and buffers stay as they are. How unequal tokens are depends on what the model knows: ask with
    the weights that the training begins with.

    Args:
        model: as it is before it is compiled; it takes the batch by name and returns a loss, and without the labels its
            logits.
        batch: arguments by name, tensors that begin with the batch's size, with ``labels`` [B, S]; or several such of
            one shape.
        options: that all candidates get.
        steps: that are timed of each.

    Raises:
        ValueError: for unusable options, a compiled model, a batch without labels, or no loss.
    """
    base = dict(options or {})
    settings = Options.parse(base)
    if compat.is_compiled(model):
        raise ValueError("model must not be compiled yet")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    batches = [batch] if isinstance(batch, Mapping) else list(batch)
    if not batches:
        raise ValueError("batch must be a mapping of the model's arguments, or a sequence of such, got none")
    gradients = [token_gradients(model, each) for each in batches]
    labelled = torch.cat([each["labels"][:, 1:] != -100 for each in batches])
    if not bool(labelled.any()):
        raise ValueError("batch must have labels other than -100 behind the first position")
    share = float(labelled.float().mean())

    first = dense_trial(model, batches, compiler=settings.compiler, steps=steps)
    half = _half(model, batches, settings.compiler, steps, first)
    candidates = []
    for name, chosen in _choices(share):
        trial = selective_trial(model, batches, {**base, **chosen}, steps=steps)
        candidates.append(_candidate(name, {**base, **chosen}, trial, first, _variance(gradients, trial)))
    # the machine may have changed its pace
    again = dense_trial(model, batches, compiler=settings.compiler, steps=steps)
    scale = first.seconds / min(first.seconds, again.seconds)
    found = tuple(replace(one, step=one.step * scale) for one in candidates)
    half = None if half is None else replace(half, step=half.step * scale)
    chosen_options, reason = decide(found, half)
    return Advice(
        share,
        concentration(torch.cat([each[:, :-1] for each in gradients]), labelled),
        first.seconds / scale,
        first.kept_bytes,
        half,
        found,
        chosen_options,
        reason,
    )


def decide(candidates: Sequence[Candidate], half: Candidate | None) -> tuple[dict[str, Any] | None, str]:
    """The options to take, None for dense training, and why.

    The measure is time for a gradient of the same variance. Half of the batch is a dense way to save time, too.
    """
    usable = [one for one in candidates if one.level != "dense"]
    if not usable:
        return None, f"stay dense: {candidates[0].reason}" if candidates else "stay dense"
    best = min(usable, key=lambda one: one.cost)
    rival = min([1.0, *([half.cost] if half is not None else [])])
    against = "half of the batch" if rival < 1.0 else "a dense step"
    if best.cost >= WORTH * rival:
        return None, (
            f"stay dense: for a gradient of equal variance the best of these, {best.name}, takes {best.cost:.2f} of "
            f"the dense time, {against} {rival:.2f}"
        )
    return best.options, (
        f"options={json.dumps(best.options)}: {_figures(best)}; for a gradient of equal variance {best.cost:.2f} of "
        f"the dense time, {against} {rival:.2f}"
    )


def _choices(share: float) -> list[tuple[str, dict[str, Any]]]:
    if share < FEW_LABELS:
        return [
            ("labels", {"selection": "labels"}),
            ("labels, exact gradient", {"selection": "labels", "gradient": "exact"}),
        ]
    return [
        (f"importance, {ratio:g} of the tokens", {"selection": "importance", "min_tokens_ratio": ratio})
        for ratio in (0.25, 0.5)
    ]


def _half(model: Module, batches: Sequence[Batch], compiler: str, steps: int, dense: Trial) -> Candidate | None:
    size = len(batches[0]["labels"])
    if size < 2:
        return None
    halves = [{name: _first(value, size) for name, value in each.items()} for each in batches]
    trial = dense_trial(model, halves, compiler=compiler, steps=steps)
    return _candidate("half of the batch", None, trial, dense, size / (size // 2))


def _first(value: Any, size: int) -> Any:
    """The first half of a batch's tensor."""
    return value[: size // 2] if isinstance(value, Tensor) and value.dim() and len(value) == size else value


def _variance(gradients: Sequence[Tensor], trial: Trial) -> float:
    """Of all batches; 1 where every token trains."""
    if not trial.views:
        return 1.0
    weights = [torch.tensor(view.weight, device=each.device) for view, each in zip(trial.views, gradients, strict=True)]
    return added_variance(torch.cat(list(gradients)), torch.cat(weights))


def _candidate(name: str, options: dict[str, Any] | None, trial: Trial, dense: Trial, variance: float) -> Candidate:
    memory = trial.kept_bytes / dense.kept_bytes if dense.kept_bytes else 1.0
    return Candidate(name, options, trial.level, trial.reason, trial.seconds / dense.seconds, memory, variance)


def _figures(one: Candidate) -> str:
    if one.options is not None and one.level == "dense":
        return f"dense ({one.reason})"
    level = f", {one.level}" if one.options is not None else ""
    return f"{one.step:.2f} of the step, {one.memory:.2f} of the memory, variance {one.variance:.2f}{level}"
