"""The options of ``torch.compile(model, backend="cggr", options={...})``: one frozen, validated record."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cggr_compile.errors import OptionError
from cggr_compile.scorings import SCORINGS
from cggr_compile.scorings.record import Scoring
from cggr_compile.selections import SELECTIONS
from cggr_compile.selections.record import Scope, Selection

# positions before a label: on SmolLM2-135M and GSM8K they close most of the distance to dense training
AUTO_CONTEXT = 128
# the selection that the first batch decides
AUTO = "auto"

# Labelled positions, as a share of all, below which the loss concerns few of them: answers behind prompts.
FEW_LABELS = 0.5


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the backend does with a training graph.

    Attributes:
        min_tokens_ratio: share of each sequence's positions that contribute gradient, in (0, 1]. A sequence
            of S positions gets ceil(ratio * S) slots. 1.0 leaves the model's loss and gradients alone. ``auto`` starts
            at 1.0 and moves on the ladder as far down as ``variance_bound`` allows.
        scoring: difficulty of a token from the router's distribution p, a record of ``cggr_compile.scorings``:
            (listed there as SCORINGS)
            Or a function (logsumexp, entropy, top1, top2, label_logprob) -> difficulty of float32 tensors [B, S], which
            torch.fx can trace.
        selection: which tokens the loss is taken over, ``auto`` or a record of ``cggr_compile.selections``:
            (listed there as SELECTIONS)
            ``auto`` looks at the first batch: ``labels``, without a router, where less than half of its positions have
            a label, with slots for as many labels and as much context as its fullest sequence has, rounded up, and
            doubled at most twice where later batches have more; else ``importance``. The log says which.
            With the weight 1/p the loss estimates the full one. Without weights the sample is biased.
        scope: whether a selection that can do both fills the slots of each ``sequence`` or of the whole ``batch``,
            where difficult sequences get more.
        num_strata: parts of the score ranking, >= 1, of ``stratified``.
        min_tokens_per_sequence: tokens that ``sequence_aware`` takes from every sequence (that has so many), >= 1.
        span: the most positions of a block of ``spans``, >= 1. As few blocks as can fill a sequence's slots do so, all
            of one size: with 512 slots and 64 here they are 8 of 64 positions, with 100 slots 2 of 50, with 20 slots 1
            of 20. The last block of a sequence may be shorter. Slots of positions without a label stay empty.
        max_selected: the most positions of one sequence that get a slot, a share of its length in (0, 1] (float) or a
            number >= 1 (int). With ``selection="labels"`` None stands for ``min_tokens_ratio``; where the scope is the
            batch, for 1.5 times that. With ``context`` these are the slots of all that carries gradient, context
            included, of any selection. Slots cost time, used or not.
        context: how many positions before each selected one, of the same document and no padding, carry gradient
            though their loss does not count: K and V of what a selected token attends to nearby are trained as densely.
            Needs ``gradient="routed"``. Documents of a packed sequence are told apart by ``position_ids`` or by what
            attention may see. What finds no slot is dropped, the farthest first, and counted
            (``metrics()["context_overflow"]``). With ``selection="labels"`` there are ``max_selected`` slots for labels
            and context together, else ``max_selected``, or twice those of the selection where that is None. ``auto``
            is 128 with ``selection="labels"``, else 0.
        top_entropy_quantile: share of the batch's candidates that are candidates at all, those of the highest entropy,
            in (0, 1]; 1.0: all. For a loss of ``cggr_compile.token_log_probs`` that leaves out the others among the
            labelled tokens, as TRL's option of this name does
            (:class:`cggr_compile.integrations.transformers.CGGRCallback` sets it). The entropies are the call's own:
            rows are chosen behind it, by what the loss sees. With ``selection="labels"`` those that find no slot are in
            ``metrics()["labels_overflow"]``.
        router_layers: blocks the router reads, 1..L; ``"full"`` for all of them; None for about L/8. Without a stack of
            blocks it reads the final hidden states.
        router_precision: what the router's head computes in: the ``model``'s dtype (under autocast, its); ``bf16``;
            ``fp8``, 8-bit floats with a scale per token and per word of the vocabulary (fast on GPUs that multiply
            them, Ada and Hopper and later; elsewhere only rounded to them); or ``auto``: bf16 on a CPU that
            multiplies bfloat16 faster than float32, the model's dtype elsewhere. Only scores and metrics see it,
            never the loss.
        gradient: ``routed`` stops the gradient into the residual stream of unselected positions at every
            attention; ``exact`` is the true gradient of the selected loss. ``auto`` is ``routed``, but ``exact`` for a
            model that trains something through positions which no label may select and which are not known (where
            they are known, as a soft prompt's are, they carry gradient under ``routed`` as well); see
            :class:`cggr_compile.passes.semantic.trained_inputs.TrainedInputs`. Without a stack of blocks the gradient
            is exact below the head whatever this says, and ``kv_gradient``, ``kv_weight`` and ``context`` mean nothing.
        kv_gradient: where ``routed`` stops it: ``project`` at the input of the key and value projections (their
            weights still learn from every position), ``stop`` at the keys and values.
        kv_weight: what the gradient that ``routed`` lets through there, at a selected position, is multiplied with:
            ``1``, or ``1/sqrt(p)``, p the position's probability of being selected. A way from one position's loss to
            another position is cut wherever it meets an unselected one; 1/p at every one it meets would make up for
            that on average, with too much variance, and 1/sqrt(p) is halfway. (The part that comes from the position's
            own query needs no such factor, but is not told apart.) Needs a selection that samples.
        row_sparse: compute only the selected rows of the backward pass. Exact either way; False shows what the pass
            itself contributes.
        verify: training steps of every compiled graph to check on the user's own batches: the backward with and
            without the row-sparse pass, every gradient compared; True checks each step, False or 0 none. Raises
            VerificationError at the forward call. See :class:`cggr_compile.verify.Verifier`.
        logits: what a training forward returns as logits: ``drop`` an empty [B, 0, V] tensor, ``detach`` all of
            them without gradient.
        cross_entropy: how the loss of the selected rows is computed: from their ``logits`` [K, V], which stay for the
            backward pass, or ``fused`` with the head, where a span of the vocabulary at a time exists
            (``cggr::linear_cross_entropy``): less memory for one more product. Not used at ratio 1.0.
        padding: ``right`` promises padding after the tokens, without labels, so that padded batches can use causal
            attention (checked on the device at every step); ``any`` makes no promise; ``auto`` decides from the first
            batch.
        seed: seed of the random selection.
        seed_per_rank: whether every process of ``torch.distributed`` draws positions of its own, so that together they
            draw more of them; False: position for position the same on all.
        advance: ``auto`` counts a step at every training forward, ``manual`` only at ``runtime.step()``.
        warmup_steps: steps over which the ratio falls linearly from 1.0 to ``min_tokens_ratio`` (curriculum).
        ladder: the ratios that a schedule moves on, each in (0, 1]; the wanted one is rounded up to the next of them.
            Each is compiled once, when first needed; 1.0 is the unmodified model. ``min_tokens_ratio``, and with
            ``warmup_steps`` 1.0, belong to it in any case. None: 1, 0.75, 0.5, 0.375, 0.25, and halves from there, as
            far as they are above ``min_tokens_ratio``, and for ``dynamic_threshold`` 0.75 and 0.5 times that; for
            ``auto`` 1, 0.5, 0.375 and 0.25.
        dynamic_threshold: multiply the ratio by 1 + threshold_sensitivity * (1 - 2 * c), c the router's mean top-1
            probability over the candidates of a recent step, read back without waiting: a model that is unsure keeps
            more tokens, one that is sure fewer, below ``min_tokens_ratio`` as well.
        threshold_sensitivity: how far ``dynamic_threshold`` goes, in [0, 1].
        variance_bound: with ``min_tokens_ratio="auto"``, how large the squared error that the selection adds to the
            gradient may be (variance and squared bias), in multiples of the variance of the batches (VCAS, arXiv
            2402.17227). See :class:`cggr_compile.variance.VarianceMeter`.
        measure_every: steps from one measurement of that to the next; each costs three training steps.
        fallback: when a training graph cannot be rewritten: ``warn`` once with the reason, raise an ``error``,
            or be ``silent``. The graph is compiled as it is in any case. One without a stack of blocks, of which head
            and loss alone are rewritten (the level "loss"), is told by ``warn`` and is no ``error``.
        launch_bound: on CUDA without CUDA graphs, where kernel launches and not arithmetic take the time, selecting
            tokens is no faster: there the graph stays ``dense``, with the reason, or tokens are ``select``-ed anyway.
        disable_passes: names of optional passes that do not run, such as ``("merge_sums",)``: to find out what one
            contributes, or whether it is at fault. Every other name is a ValueError that lists them.
        compiler: ``inductor``, ``eager`` (AOTAutograd, no code generation), or ``auto``.
        dump_dir: folder for readable graphs and report.json; None reads the environment's CGGR_DUMP_DIR.
        cuda_graphs: replay the step as CUDA graphs (Inductor's ``triton.cudagraphs``, as ``mode="reduce-overhead"``
            sets it); needs a CUDA device.
        inductor: settings passed on to Inductor, as ``torch.compile`` takes them in its own ``options``. With
            ``{"max_autotune": True}`` (or ``mode="max-autotune"``) it also times tile sizes of the scoring kernel (on
            an H100 the fixed ones are as fast) and ways of multiplying by experts on CUDA.
    """

    min_tokens_ratio: float | Literal["auto"] = 0.25
    scoring: str | Callable[..., Any] = "combined"
    selection: str = "auto"
    scope: Scope = "sequence"
    num_strata: int = 4
    min_tokens_per_sequence: int = 1
    span: int = 64
    max_selected: float | int | None = None
    context: int | Literal["auto"] = "auto"
    top_entropy_quantile: float = 1.0
    router_layers: int | Literal["full"] | None = None
    router_precision: Literal["auto", "model", "bf16", "fp8"] = "auto"
    gradient: Literal["auto", "routed", "exact"] = "auto"
    kv_gradient: Literal["project", "stop"] = "project"
    kv_weight: Literal["1", "1/sqrt(p)"] = "1"
    row_sparse: bool = True
    verify: bool | int = False
    logits: Literal["drop", "detach"] = "drop"
    cross_entropy: Literal["logits", "fused"] = "logits"
    padding: Literal["auto", "right", "any"] = "auto"
    seed: int = 0
    seed_per_rank: bool = True
    advance: Literal["auto", "manual"] = "auto"
    warmup_steps: int = 0
    ladder: Sequence[float] | None = None
    dynamic_threshold: bool = False
    threshold_sensitivity: float = 0.5
    variance_bound: float = 0.3
    measure_every: int = 100
    fallback: Literal["warn", "error", "silent"] = "warn"
    launch_bound: Literal["dense", "select"] = "dense"
    disable_passes: Sequence[str] = ()
    compiler: Literal["auto", "inductor", "eager"] = "auto"
    dump_dir: str | None = None
    cuda_graphs: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.min_tokens_ratio != "auto":
            _check_ratio("min_tokens_ratio", self.min_tokens_ratio, "'auto' or a number in (0, 1]")
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            if get_origin(hints[item.name]) is Literal:
                _check_choice(item.name, getattr(self, item.name), get_args(hints[item.name]))
        if not callable(self.scoring):
            _check_choice("scoring", self.scoring, tuple(SCORINGS))
        _check_choice("selection", self.selection, (AUTO, *SELECTIONS))
        layers = self.router_layers
        if not (layers is None or layers == "full" or (_is_int(layers) and int(layers) >= 1)):
            raise OptionError(f"router_layers must be None, 'full' or an integer >= 1, got {layers!r}")
        if not _is_int(self.seed) or not 0 <= self.seed < 2**31:
            raise OptionError(f"seed must be an integer in [0, 2**31), got {self.seed!r}")
        self._check_schedule()
        for name in ("row_sparse", "cuda_graphs", "dynamic_threshold"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.verify, int) or self.verify < 0:
            raise OptionError(f"verify must be True, False or a number of steps >= 0, got {self.verify!r}")
        if not (self.dump_dir is None or isinstance(self.dump_dir, str)):
            raise OptionError(f"dump_dir must be a string or None, got {self.dump_dir!r}")
        names = self.disable_passes
        if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in names):
            raise OptionError(f"disable_passes must be a list of names of passes, got {names!r}")
        if not isinstance(self.inductor, Mapping):
            raise OptionError(f"inductor must be a dict of Inductor settings, got {self.inductor!r}")
        self._check_selection()

    def _check_selection(self) -> None:
        record = self.selection_record
        if record.scores == "needed":
            self._check_router(f"selection={self.selection!r} needs a score", lambda record: record.needs_router)
        if self.kv_weight != "1" and (not record.sampled or self.gradient == "exact"):
            raise OptionError(
                f"kv_weight={self.kv_weight!r} needs gradient='routed' and a selection that samples, one of "
                f"{_sampled()}; got gradient={self.gradient!r}, selection={self.selection!r}"
            )
        for name in ("num_strata", "min_tokens_per_sequence", "span"):
            _check_integer(name, getattr(self, name), 1)
        if self.scope == "batch" and "batch" not in record.scopes:
            able = SELECTIONS.names(lambda record: "batch" in record.scopes)
            raise OptionError(f"scope='batch' is for selection in {able}; selection={self.selection!r} is per sequence")
        if self.context != "auto":
            _check_context(self.context, self.gradient)
        _check_ratio("top_entropy_quantile", self.top_entropy_quantile)
        most = self.max_selected
        if most is None:
            return
        share = isinstance(most, float) and 0.0 < most <= 1.0
        if not share and not (_is_int(most) and most >= 1):
            raise OptionError(
                f"max_selected must be a share in (0, 1] (float), a number >= 1 (int) or None, got {most!r}"
            )
        if not self._caps_selected and not self.context_rows and self.selection != AUTO:
            able = SELECTIONS.names(lambda record: "max_selected" in record.options)
            raise OptionError(
                f"max_selected is for selection in {able} or scope='batch', or with context > 0; min_tokens_ratio does "
                "it here"
            )

    def _check_router(self, why: str, able_to: Callable[[Scoring], bool]) -> None:
        able = SCORINGS.names(able_to)
        if not callable(self.scoring) and self.scoring not in able:
            raise OptionError(f"{why}: scoring must be one of {able} or a function, got {self.scoring!r}")

    def _check_schedule(self) -> None:
        _check_integer("warmup_steps", self.warmup_steps, 0)
        if self.ladder is not None:
            if not isinstance(self.ladder, (list, tuple)) or not self.ladder:
                raise OptionError(f"ladder must be None or a list of numbers in (0, 1], got {self.ladder!r}")
            for ratio in self.ladder:
                _check_ratio("ladder", ratio)
        _check_share("threshold_sensitivity", self.threshold_sensitivity)
        if self.dynamic_threshold is True:
            self._check_router("dynamic_threshold needs the router's confidence", lambda record: record.reads_head)
        _check_number("variance_bound", self.variance_bound, "a number > 0")
        if self.variance_bound <= 0:
            raise OptionError(f"variance_bound must be a number > 0, got {self.variance_bound!r}")
        _check_integer("measure_every", self.measure_every, 1)
        if self.min_tokens_ratio == "auto":
            self._check_auto()

    def _check_auto(self) -> None:
        if not self.selection_record.sampled:
            raise OptionError(
                "min_tokens_ratio='auto' measures the variance of a random selection: selection must be one of "
                f"{_sampled()}, got {self.selection!r}"
            )
        if self.dynamic_threshold:
            raise OptionError("dynamic_threshold must be False with min_tokens_ratio='auto': both move the ratio")
        if self.ladder is not None and min(self.ladder) == 1.0:
            raise OptionError(f"ladder must have a ratio below 1.0 with min_tokens_ratio='auto', got {self.ladder!r}")

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Options:
        """Options from a plain mapping.

        Raises:
            ValueError: for an unknown name (with the nearest valid one) or a value out of range.
        """
        if options is None:
            return cls()
        if isinstance(options, cls):
            return options
        if not isinstance(options, Mapping):
            raise OptionError(f"options must be a dict, got {type(options).__name__}")
        known = [item.name for item in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise OptionError(f"unknown option {name!r}{_hint(str(name), known)}; options: {', '.join(known)}")
        return cls(**options)

    @property
    def ratio(self) -> Fraction:
        """``min_tokens_ratio`` as a fraction, so that slot counts are integer arithmetic on any size."""
        assert self.min_tokens_ratio != "auto"  # a graph has one of the ladder's
        return _fraction(self.min_tokens_ratio)

    @property
    def selection_record(self) -> Selection:
        """``auto`` is checked as what it is where the labels do not decide: ``importance``."""
        return SELECTIONS["importance" if self.selection == AUTO else self.selection]

    @property
    def whole_batch(self) -> bool:
        """Whether tokens of different sequences compete for slots."""
        return self.scope == "batch" or "sequence" not in self.selection_record.scopes

    @property
    def _caps_selected(self) -> bool:
        """Whether ``max_selected`` is about the selected tokens, and not only about these with their context."""
        return "max_selected" in self.selection_record.options or self.whole_batch

    @property
    def most_slots(self) -> Fraction | int:
        """Slots of a sequence for what is selected: a share of its positions, or a number."""
        if self.max_selected is not None and self._caps_selected:
            return _slots(self.max_selected)
        return min(Fraction(1), self.ratio * Fraction(3, 2)) if self.whole_batch else self.ratio

    @property
    def context_rows(self) -> int:
        """``context`` as a number; it means nothing where the gradient is exact."""
        if self.context == "auto":
            return AUTO_CONTEXT if self.selection_record.takes_all and self.gradient != "exact" else 0
        return self.context

    @property
    def most_gradient_slots(self) -> Fraction | int:
        """The same for all that carries gradient, with context; where it is less than for what is selected, as many."""
        if self.max_selected is not None:
            return _slots(self.max_selected)
        return self.most_slots if self.selection_record.takes_all else min(Fraction(1), 2 * self.most_slots)

    @property
    def needs_router(self) -> bool:
        return callable(self.scoring) or SCORINGS[self.scoring].needs_router

    @property
    def predicts(self) -> bool:
        """Whether a network beside the model predicts the scores."""
        return not callable(self.scoring) and SCORINGS[self.scoring].predicted

    @property
    def scoring_name(self) -> str:
        return callable_name(self.scoring) if callable(self.scoring) else self.scoring

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "scoring": self.scoring_name}

    def digest(self) -> str:
        """Hash of everything that can change the compiled graph."""
        same_graph = {"dump_dir", "fallback", "advance", "seed", "seed_per_rank", "verify", *_SCHEDULE}
        fields = {k: v for k, v in self.as_dict().items() if k not in same_graph}
        # a graph calls a formula by its name
        formula = self.scoring if callable(self.scoring) else SCORINGS[self.scoring].formula
        if formula is not None:
            fields["scoring"] = (self.scoring_name, _source(formula))
        return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


# which ratio a step runs at; a graph has but one
_SCHEDULE = {"warmup_steps", "ladder", "dynamic_threshold", "threshold_sensitivity", "variance_bound", "measure_every"}


def _sampled() -> list[str]:
    return SELECTIONS.names(lambda record: record.sampled)


def callable_name(function: Callable[..., Any]) -> str:
    owner = function if hasattr(function, "__qualname__") else type(function)
    return f"{owner.__module__}.{owner.__qualname__}"


def _source(function: Callable[..., Any]) -> str:
    """What tells one version of a function from another."""
    code = getattr(function, "__code__", getattr(type(function).__call__, "__code__", None))
    compiled = ""
    if code is not None:
        constants = [value for value in code.co_consts if not inspect.iscode(value)]  # which print their address
        compiled = f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"
    try:
        return inspect.getsource(function) + compiled  # of two lambdas in one line the source is the same
    except (OSError, TypeError):  # typed into an interpreter, or an object with __call__
        return compiled


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _fraction(share: float) -> Fraction:
    return max(Fraction(share).limit_denominator(10_000), Fraction(1, 10_000))


def _slots(most: float | int) -> Fraction | int:
    return _fraction(most) if isinstance(most, float) else most


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_number(name: str, value: Any, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise OptionError(f"{name} must be {expected}, got {value!r}")


def _check_ratio(name: str, value: Any, expected: str = "a number in (0, 1]") -> None:
    _check_number(name, value, expected)
    if not 0.0 < value <= 1.0:
        raise OptionError(f"{name} must be in (0, 1], got {value!r}")


def _check_share(name: str, value: Any) -> None:
    _check_number(name, value, "a number in [0, 1]")
    if not 0.0 <= value <= 1.0:
        raise OptionError(f"{name} must be in [0, 1], got {value!r}")


def _check_integer(name: str, value: Any, least: int) -> None:
    if not _is_int(value) or value < least:
        raise OptionError(f"{name} must be an integer >= {least}, got {value!r}")


def _check_context(context: Any, gradient: str) -> None:
    if not _is_int(context) or context < 0:
        raise OptionError(f"context must be 'auto' or an integer >= 0, got {context!r}")
    if context > 0 and gradient == "exact":
        raise OptionError(
            f"context={context} needs gradient='routed' (or 'auto'), which stops the gradient of what is not selected; "
            "got gradient='exact', which stops none"
        )


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        hint = _hint(value, list(allowed)) if isinstance(value, str) else ""
        raise OptionError(f"{name} must be one of {sorted(allowed)}, got {value!r}{hint}")


if Options.__doc__:  # python -OO has none
    for place, table in (("(listed there as SCORINGS)", SCORINGS), ("(listed there as SELECTIONS)", SELECTIONS)):
        Options.__doc__ = Options.__doc__.replace(place, table.listing(" " * 12))
