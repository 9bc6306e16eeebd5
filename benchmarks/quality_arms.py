"""What quality.py compares: a table. An arm is a set of options of backend "cggr", or dense training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cggr_compile import Options

# in the table: as many slots as 95 of 100 sequences need for all their labels
FITTING = "fitting"


@dataclass(frozen=True)
class Arm:
    """One way to spend the time.

    Attributes:
        options: of backend "cggr"; None trains densely (the baseline `fair` of arms.py).
        batch: share of the regime's tokens in a step.
        budget: share of the seconds.
        steps: if above 0, a run lasts this share of the steps that `dense` makes, whatever time that takes.
        warmup: curriculum: share of the steps that `dense` makes in its time after which the ratio has come down.
    """

    options: Mapping[str, Any] | None = field(default_factory=dict)
    batch: float = 1.0
    budget: float = 1.0
    steps: float = 0.0
    warmup: float = 0.0

    def resolved(self, *, usual_labels: int, dense_steps: int | None) -> dict[str, Any] | None:
        """The options with what depends on data and time filled in."""
        if self.options is None:
            return None
        options = {name: usual_labels if value == FITTING else value for name, value in self.options.items()}
        if self.warmup:
            assert dense_steps is not None
            options["warmup_steps"] = max(1, round(self.warmup * dense_steps))
        return options


RANDOM: dict[str, Any] = {"selection": "random", "scoring": "random"}
AUTO: dict[str, Any] = {"min_tokens_ratio": "auto", "measure_every": 25}  # four times as often as the default
LABELS: dict[str, Any] = {"selection": "labels", "scoring": "random", "context": 0}

# Where budget is 1 all end at equal measured seconds. There dense-half-batch makes about as many steps as an arm that
# costs half as much per step. Budget 0.5 shows what dense training reaches for half the price.
ARMS: dict[str, Arm] = {
    "dense": Arm(None),
    "dense-half-batch": Arm(None, batch=0.5),
    "dense-half-steps": Arm(None, budget=0.5),
    "dense-half-both": Arm(None, batch=0.5, budget=0.5),  # as many steps as dense, half the tokens in each
    "random": Arm(RANDOM),
    "random-half": Arm({**RANDOM, "min_tokens_ratio": 0.5}),
    "importance": Arm(),
    "importance-half": Arm({"min_tokens_ratio": 0.5}),
    # scored by the whole model and exactly: what selection could do with a perfect router
    "full-half": Arm({"min_tokens_ratio": 0.5, "router_layers": "full", "scoring": "el2n"}),
    "loss": Arm({"scoring": "loss"}),
    "stratified": Arm({"selection": "stratified"}),
    "topk": Arm({"selection": "topk"}),
    "stop": Arm({"kv_gradient": "stop"}),
    "kv-weight": Arm({"kv_weight": "1/sqrt(p)"}),
    "exact": Arm({"gradient": "exact"}),
    "auto": Arm(AUTO),
    "auto-steps": Arm(AUTO, steps=1.0),
    "auto-full": Arm({**AUTO, "router_layers": "full", "scoring": "el2n"}),
    "curriculum": Arm(RANDOM, warmup=0.15),
    # no ratios between: dense, then half of the tokens
    "dense-first": Arm({**RANDOM, "min_tokens_ratio": 0.5, "ladder": [1.0]}, warmup=0.15),
    "labels": Arm({**LABELS, "max_selected": FITTING}),
    "labels-steps": Arm({**LABELS, "max_selected": FITTING}, steps=1.0),
    "labels-stop": Arm({**LABELS, "max_selected": FITTING, "kv_gradient": "stop"}),
    "labels-exact": Arm({**LABELS, "max_selected": FITTING, "gradient": "exact"}),
    "labels-quarter": Arm({**LABELS, "max_selected": 0.25}),
}
CONTROLS = ("dense", "dense-half-batch", "dense-half-steps")
DEFAULTS = {
    "scratch": (*CONTROLS, "random", "random-half", "importance", "dense-first", "topk"),
    "finetune": (*CONTROLS, "random", "random-half", "importance", "dense-first", "auto"),
    "prompted": (*CONTROLS, "random-half", "importance-half", "auto", "auto-steps", "auto-full"),
    "sft": (*CONTROLS, "labels", "labels-steps", "labels-exact", "labels-quarter"),
}
_SHARES = ("batch", "budget", "steps", "warmup")


def parse_arm(text: str) -> tuple[str, Arm]:
    """``name=JSON``: options of the backend and the shares that an :class:`Arm` has; ``"dense": true``: a dense one.

    Raises:
        ValueError: what is wrong with it.
    """
    name, equals, content = text.partition("=")
    if not equals or not name:
        raise ValueError(f"an arm is name=JSON, got {text!r}")
    try:
        found = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"arm {name}: not JSON: {content!r}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"arm {name} must be a JSON object, got {content!r}")
    shares = {key: float(found.pop(key)) for key in _SHARES if key in found}
    for key, share in shares.items():
        if not 0.0 < share <= 1.0:
            raise ValueError(f"arm {name}: {key} must be in (0, 1], got {share}")
    dense = found.pop("dense", False)
    if dense and found:
        raise ValueError(f"arm {name} is dense and cannot have the options {sorted(found)}")
    arm = Arm(None if dense else found, **shares)
    Options.parse(arm.resolved(usual_labels=1, dense_steps=1))
    return name, arm


def as_dict(arm: Arm) -> dict[str, Any]:
    """For the JSON file: what the arm is, so that a later run under its name can be compared."""
    return dataclasses.asdict(arm)
