"""What lives with a compiled model from step to step: counter, seed, selection, metrics, reports."""

from __future__ import annotations

import logging
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cggr_compile import recompile_limit
from cggr_compile.agreement import Agreement
from cggr_compile.causes import PIECES, Cause
from cggr_compile.data_parallel import seed_of_rank
from cggr_compile.ops.metrics import GRADIENT, STAT_NAMES
from cggr_compile.options import OptionError, Options
from cggr_compile.overflow import Overflow
from cggr_compile.passes.step_interface import PredictorKey, StepOutputs
from cggr_compile.predictors import Predictors
from cggr_compile.recent_concentration import RecentConcentration
from cggr_compile.report import GraphReport, Verification
from cggr_compile.schedule import Schedule
from cggr_compile.selections import SELECTIONS
from cggr_compile.shared_readback import Combine, SharedReadback
from cggr_compile.slot_growth import SlotGrowth
from cggr_compile.stale_steps import StaleSteps
from cggr_compile.variance import Measurement

log = logging.getLogger(__name__)
# what ``Runtime.measure`` takes
Measure = Callable[[int], Measurement | None]
NOTHING = "nothing compiled yet"
_STATE_VERSION = 4
_STATE_KEYS = {1: {"version", "step", "seed"}}
_STATE_KEYS[2] = _STATE_KEYS[1] | {"schedule"}
_STATE_KEYS[3] = _STATE_KEYS[2] | {"predictors"}
_STATE_KEYS[4] = _STATE_KEYS[3] | {"concentration"}


# what has been said of the pieces of a step: each has parameters of its own, and may have a runtime of its own
_told: set[str] = set()


class FallbackWarning(UserWarning):
    """A training graph, or a part of its backward pass, is computed for every position."""


class Runtime:
    """State of one model under the backend. Get it with :func:`cggr_compile.runtime`.

    Attributes:
        selected: int64 [B, K] on the model's device: for each sequence of the last training forward the selected
            positions in ascending order, then -1 for every unused slot (a sequence with fewer candidates than
            slots). A prompt that the model puts in front of the tokens counts: its positions are the first. None
            before the first, or at ratio 1.0. A tuple of such, in the order of the step's forwards, where one graph
            trains on several.
        weights: float32 [B, K], what the loss at each of these positions counted: the loss was their weighted sum,
            divided by the number of candidates if it is a mean. 0 for an unused slot; None, or a tuple, where
            ``selected`` is.
        options: the options of the last compilation.
        reports: a GraphReport per graph compiled for this model.
    """

    def __init__(self) -> None:
        self.options = Options()
        self.reports: list[GraphReport] = []
        self.selected: Tensor | tuple[Tensor, ...] | None = None
        self.weights: Tensor | tuple[Tensor, ...] | None = None
        self._stats: Tensor | None = None
        self._overflow = Overflow()
        self._growth = SlotGrowth()
        self._last: GraphReport | None = None
        self._step = 0
        self._seed: int | None = None  # None: the options'
        self._schedule = Schedule()
        self._device_state: Tensor | None = None
        self._predictors = Predictors()
        self._concentration, self._advised = RecentConcentration(), False
        self._warned: set[str] = set()
        self._observed: list[GraphReport] | None = None
        self._verification = Verification()
        self._stale = StaleSteps()
        self._agreement: Agreement | None = None
        self._shared: list[SharedReadback] = []
        self._first_batch: Any = None  # of all processes, combined
        self._growth_shared = False
        self._compared = 0  # steps whose comparison all processes have heard of
        self._given_up = ""  # why, if Dynamo has given up on the model's code

    def step(self) -> None:
        """Advance the step by one. Needed with ``advance="manual"`` only (gradient accumulation)."""
        self._step += 1
        if self._device_state is not None:
            self._device_state[1].add_(1)  # on the device: no transfer, no synchronisation
        for shared in self._shared:
            shared.advance()

    def metrics(self) -> dict[str, Any]:
        """Figures of the last training forward. Besides ``verify``, the only thing that waits for the device.

        Where one graph trains on several forwards the figures are those of all of them together.

        Keys: step; ratio of the graph that ran: ``min_tokens_ratio`` or the rung of the schedule, 1.0 where every token
        is trained on (None before the first); token_ratio = tokens_selected / tokens_total; tokens_selected;
        tokens_total (candidates); avg_confidence, avg_entropy, avg_difficulty over the candidates (None where no router
        ran); gradient_tokens: positions that carry gradient, the selected ones and others (``context``, a soft prompt;
        None where every position does); scoring; selection; labels_overflow: tokens with a label that found no slot in
        any step so far (None unless the selection takes all of them, as ``labels`` does); context_overflow: positions
        that should carry gradient without being selected (context, those of a trained image projector) and found no
        slot in any step so far (None without such); matched; level: "routed", "loss" (head and loss on the selected
        positions, the gradient below them exact) or "dense" if not matched (None before the first); fallback_reason:
        why the level is not "routed" (None if it is); verify_steps, verify_max_error, verify_worst: steps that the
        option ``verify`` has compared, the largest error (None before
        the first) and whose it was; added_variance: E / V_batch as last measured for ``min_tokens_ratio="auto"``, else
        None; score_correlation: of the gradients that ``scoring="learned"`` has predicted and those that the rows
        turned out to have, over about the last 20 steps, weighted (None for other scorings, and before the first step);
        concentration: (mean g)^2 / mean g^2 over the labelled tokens of about the last 20 steps of this process, g =
        ||softmax - onehot||, estimated from the rows that carry loss, with ``scoring="learned"`` or
        ``min_tokens_ratio="auto"`` (None for others, before the first step, and without p: see docs/schedules.md);
        stale_steps: training steps since these figures were taken, which ran without the backend because Dynamo
        has given up on the model's code (0 as long as it has not). Steps of a torch.optim.Optimizer are counted.
        """
        report = self._last
        values: dict[str, Any] = dict.fromkeys(STAT_NAMES)
        gradient_tokens = None
        if self._stats is not None:
            numbers = self._stats.tolist()
            values = {k: None if math.isnan(v) else v for k, v in zip(STAT_NAMES, numbers, strict=False)}
            values["tokens_selected"], values["tokens_total"] = int(numbers[0]), int(numbers[1])
            if report is not None and report.matched and report.gradient == "routed":
                gradient_tokens = int(numbers[GRADIENT if len(numbers) > GRADIENT else 0])
        total = values["tokens_total"]
        stale = self._stale.count
        reason = report.reason if report is not None else "; ".join(filter(None, (NOTHING, recompile_limit.given_up())))
        matched = report.matched if report is not None else False
        if report is not None and matched:
            reason = report.obstacle
        if self._given_up and (stale or report is None):
            matched, reason = False, self._given_up
        return {
            "step": self._step,
            "ratio": report.ratio if report is not None else None,
            "token_ratio": values["tokens_selected"] / total if total else (0.0 if total == 0 else 1.0),
            **values,
            "gradient_tokens": gradient_tokens,
            "scoring": self.options.scoring_name,
            "selection": (report.selection if report is not None else "") or self.options.selection,
            "labels_overflow": self._overflow.labels(),
            "context_overflow": self._overflow.context(),
            "matched": matched,
            "level": _level(report, matched),
            "fallback_reason": reason or None,
            "verify_steps": self._verification.steps,
            "verify_max_error": self._verification.max_error,
            "verify_worst": self._verification.worst,
            "added_variance": self._schedule.auto.added,
            "score_correlation": self._predictors.correlation(),
            "concentration": self._unequal(),
            "stale_steps": stale,
        }

    def _unequal(self) -> float | None:
        """The concentration, of the sums that the schedule keeps, or the predictors."""
        found = self._concentration.value()
        if found is None and self._last is not None and self._last.matched and SELECTIONS[self._last.selection].sampled:
            found = self._predictors.concentration()
        return found

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: plain numbers and text, safe to store in any checkpoint.

        Waits for the device if a schedule is reading figures back from it, or ``scoring="learned"`` trains there.
        """
        schedule, predictors = self._schedule.state_dict(self._step), self._predictors.state_dict()
        state = {"version": _STATE_VERSION, "step": self._step, "seed": self.seed, "schedule": schedule}
        return {**state, "predictors": predictors, "concentration": self._concentration.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`; the next forward selects what it would have selected then, at the same ratio.

        States of version 1, which had no schedule, start it with what their step says; those of version 2 begin to
        learn anew; before version 4 there is no concentration yet.

        Raises:
            ValueError: if ``state`` is not such a dict.
        """
        if not isinstance(state, Mapping) or state.get("version") not in _STATE_KEYS:
            raise ValueError(f"state must be a dict with a version in {sorted(_STATE_KEYS)}, got {state!r}")
        expected = _STATE_KEYS[state["version"]]
        if set(state) != expected:
            raise ValueError(f"state must have exactly the keys {sorted(expected)}, got {state!r}")
        for name in ("step", "seed"):
            if not isinstance(state[name], int) or state[name] < 0:
                raise ValueError(f"state: {name} must be an integer >= 0, got {state[name]!r}")
        self._predictors.load_state_dict(state.get("predictors", {}))
        self._concentration.load_state_dict(state.get("concentration"))
        if "schedule" in state:
            self._schedule.load_state_dict(state["schedule"], state["step"])
        else:
            self._schedule.reset()
        self._step, self._seed = state["step"], state["seed"]
        self._device_state = None

    @property
    def seed(self) -> int:
        return self.options.seed if self._seed is None else self._seed

    # What the backend calls.

    def begin(self, report: GraphReport, options: Options) -> None:
        """A graph of this model has been compiled."""
        other_seed = options.seed != self.options.seed and self._seed is None
        if other_seed or options.seed_per_rank != self.options.seed_per_rank:
            self._device_state = None
        self.options = options
        self.reports.append(report)
        self.observe(report)
        if report.training:
            self._last = report
        if self._given_up and not recompile_limit.given_up():  # Dynamo compiles again
            self._given_up = ""
            self._stale.end()

    @property
    def agreement(self) -> Agreement | None:
        """What this model's processes decide together by."""
        return self._agreement

    def join(self, agreement: Agreement, options: Options) -> None:
        """From now on the schedule decides, and what predicts difficulties learns, by what all of this model's
        processes have measured."""
        self._agreement = agreement
        self._shared += self._schedule.share(options, self._readback)
        if options.predicts:
            self._shared.append(self._predictors.share(self._readback))

    def first_batch(self, measured: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """What all processes have ``measured`` on their first batches, combined; alone, what this one has."""
        if self._agreement is None or self._agreement.alone:
            return measured
        if self._first_batch is None:
            self._first_batch = self._agreement.decide("first batch", measured, combine)
        return measured if self._first_batch is None else self._first_batch

    def share_growth(self) -> None:
        """Slots grow by what the batches of all processes need."""
        if self._agreement is not None and not self._growth_shared:
            self._growth_shared = True
            self._shared.append(self._growth.share(self._readback))

    def hear_failures(self, failure: str, steps: int) -> str:
        """Tell the other processes what ``verify`` has found in this step, and hear what they have found.

        Args:
            failure: empty if nothing. steps: how many are compared; True for all. Of graphs that are compiled later,
                in this process alone, the others hear nothing.

        Returns:
            the first failure of any process; empty if there is none.
        """
        agreement, self._compared = self._agreement, self._compared + 1
        if agreement is None or (steps is not True and self._compared > steps):
            return failure

        def first(found: list[Any]) -> str:
            said = zip(agreement.ranks, found, strict=True)
            return next((f"on rank {rank}: {text}" for rank, text in said if text), "")

        return agreement.decide("verify", failure, first) or failure

    def _readback(self, topic: str, combine: Combine, **period: int) -> SharedReadback:
        assert self._agreement is not None
        this = weakref.ref(self)
        return SharedReadback(self._agreement, topic, combine, lambda: this()._step, **period)  # type: ignore[union-attr]

    def state(self, device: torch.device) -> Tensor:
        """(seed, step) of the next training forward, as a fresh int64 [2] on ``device``."""
        if self._device_state is None or self._device_state.device != device:
            seed = seed_of_rank(self.seed) if self.options.seed_per_rank else self.seed
            self._device_state = torch.tensor([seed, self._step], dtype=torch.int64, device=device)
        # a copy: the compiled graph may keep its input for the backward pass
        return self._device_state.clone()

    def other_state(self, device: torch.device) -> Tensor:
        """:meth:`state` of another selection for the same forward, by another seed."""
        state = self.state(device)
        state[0].add_(0x51ED2705)
        return state

    def predictors(self, keys: Sequence[PredictorKey], device: torch.device) -> tuple[Tensor, ...]:
        """What the next training forward predicts difficulties by, on ``device``. They are never written to."""
        return tuple(self._predictors.get(key, device) for key in keys)

    def advance(self) -> None:
        """A training forward happens now; it is a step if that is automatic."""
        if self.options.advance == "auto":
            self.step()

    def ratio(self, options: Options) -> float:
        """What the schedule wants for the step that is about to run."""
        ratio = self._schedule.ratio(options, self._step)
        if not self._advised and (message := self._schedule.auto.advice()):
            self._advised = True
            self.notify(message)
        return ratio

    def preview(self, options: Options) -> float:
        """What :meth:`ratio` would say, deciding nothing. Waits for figures that are under way."""
        return self._schedule.preview(options, self._step)

    def measure(self, measurement: Measure, ratio: float) -> None:
        """Before a training forward: measure what is added at ``ratio``, if this step is one to do so.

        Args:
            measurement: given the step, that of :class:`VarianceMeter`; None at a step without a measurement.
        """
        if self._step >= self.options.warmup_steps:
            found = measurement(self._step)
            if found is not None:
                if found.moments is not None:
                    self._concentration.add(found.moments, ratio)
                self._schedule.auto.measured(found.figures, ratio, self._concentration.sums)

    def record(self, report: GraphReport, returned: StepOutputs) -> None:
        """A training forward has run, and the graph has returned this besides the user's results."""
        self._last = report
        self._stale.seen()
        self.selected, self.weights = (_only(values) for values in (returned.selected, returned.weights))
        self._stats = stats = returned.stats
        self._predictors.update(returned.predictors)
        if returned.selected:
            for notice in self._overflow.add(stats, SELECTIONS[report.selection].takes_all):
                (self.warn if notice.alarm else self.notify)(notice.text)
        if returned.moments is not None and report.ratio is not None:
            self._schedule.auto.observe(self._concentration.add(returned.moments, report.ratio))
        if stats is not None and self.options.dynamic_threshold:
            self._schedule.observe(stats)

    @property
    def growth(self) -> int:
        """How often slots that were measured on the first batch are doubled."""
        return self._growth.level

    def grow(self, stats: Tensor, most: int) -> None:
        """Count what found no slot in a step, and double the slots (up to ``most`` times) where it is much."""
        if message := self._growth.add(stats, most):
            self.notify(f"{message}, which compiles the step anew (doubling {self.growth} of {most})")

    def verified(self, error: float, worst: str) -> None:
        """A training step has been compared."""
        self._verification.add(error, worst)

    def observe(self, report: GraphReport) -> None:
        """Tell :meth:`observed`, if it is under way, of a graph that is compiled or runs."""
        if self._observed is not None and report not in self._observed:
            self._observed.append(report)

    @property
    def is_observed(self) -> bool:
        """Whether :meth:`observed` is under way: a call is a :class:`cggr_compile.call.ObservedCall` meanwhile."""
        return self._observed is not None

    @contextmanager
    def observed(self) -> Iterator[list[GraphReport]]:
        """Collects the reports of the graphs that run meanwhile; step, selection and metrics stand still."""
        options, last, self._observed = self.options, self._last, []
        try:
            yield self._observed
        finally:
            self.options, self._last, self._observed = options, last, None

    def fall_back(self, report: GraphReport) -> None:
        """Say once, as the options ask, that a training graph is compiled as it is, or but for head and loss."""
        partly = report.level == "loss"
        why = report.obstacle if partly else report.reason
        if self.options.fallback == "error" and not partly:
            raise OptionError(f"the backend cannot rewrite this graph and fallback='error': {why}")
        if report.cause in PIECES and self.options.fallback != "silent":
            if why in _told or (report.cause is Cause.PLAIN_PYTHON and _told):
                return
            _told.add(why)
        runs = "computes head and loss of the selected positions, all else of every one" if partly else "runs as it is"
        self.warn(f"this training graph {runs}: {why}")

    def give_up(self, reason: str, options: Options, parameters: Iterable[Tensor]) -> None:
        """Dynamo compiles this model no more: what it has not compiled yet runs without the backend."""
        self._given_up = reason
        if self._agreement is not None:
            self._agreement.leave(reason)
        self._stale.begin(parameters)
        if options.fallback == "error":
            raise OptionError(f"the backend no longer sees this model and fallback='error': {reason}")
        if options.fallback != "silent":
            self.warn(reason)

    def warn(self, message: str) -> None:
        """Warn once per model, unless ``fallback="silent"``."""
        if self.options.fallback != "silent" and message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"cggr: {message}", FallbackWarning, stacklevel=3)

    def notify(self, message: str) -> None:
        """Log a message once per model."""
        if message not in self._warned:
            self._warned.add(message)
            log.warning(message)


def _only(values: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...] | None:
    """That of the only forward; those of several; None if there is none."""
    return values if len(values) > 1 else next(iter(values), None)


def _level(report: GraphReport | None, matched: bool) -> str | None:
    return None if report is None else report.level if matched else "dense"


def reset() -> None:
    """``torch._dynamo.reset()``: what has been said of pieces of a step may be said again."""
    _told.clear()
    recompile_limit.reset()
