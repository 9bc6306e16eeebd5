"""The arguments that the loss, the scorer and the model share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from inspect import Parameter
from typing import Any, ParamSpec, TypedDict

from cggr_compile.options import OptionError, _check_choice, _check_integer, _check_ratio, _check_share
from cggr_compile.scorings import SCORINGS
from cggr_compile.selections import SELECTIONS
from cggr_compile.table import listed

P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How tokens are scored and how many of which are selected.

    Attributes:
        scoring: difficulty from the distribution p: a record of ``cggr_compile.scorings`` that modules can compute.
        selection: which tokens, a record of ``cggr_compile.selections`` that modules offer:
            (listed there as SELECTIONS)
        dynamic_threshold, threshold_sensitivity: see :func:`cggr_compile.modules.schedule.adjust_to_confidence`.
        min_tokens_ratio, warmup_steps: see :func:`cggr_compile.modules.schedule.curriculum_ratio`.

    Raises:
        ValueError: for a value out of range; it names the argument.
    """

    scoring: str = "combined"
    selection: str = "topk"
    dynamic_threshold: bool = True
    threshold_sensitivity: float = 0.5
    min_tokens_ratio: float = 0.25
    warmup_steps: int = 1000
    num_strata: int = 4
    min_tokens_per_sequence: int = 1

    def __post_init__(self) -> None:
        _check_choice("scoring", self.scoring, tuple(SCORINGS.names(lambda record: record.in_modules)))
        _check_choice("selection", self.selection, tuple(SELECTIONS.names(lambda record: record.in_modules)))
        if not isinstance(self.dynamic_threshold, bool):
            raise OptionError(f"dynamic_threshold must be True or False, got {self.dynamic_threshold!r}")
        _check_share("threshold_sensitivity", self.threshold_sensitivity)
        _check_ratio("min_tokens_ratio", self.min_tokens_ratio)
        for name, least in (("warmup_steps", 0), ("num_strata", 1), ("min_tokens_per_sequence", 1)):
            _check_integer(name, getattr(self, name), least)


class Arguments(TypedDict, total=False):
    """The fields of :class:`Settings` as keyword arguments."""

    scoring: str
    selection: str
    dynamic_threshold: bool
    threshold_sensitivity: float
    min_tokens_ratio: float
    warmup_steps: int
    num_strata: int
    min_tokens_per_sequence: int


def takes_settings(*order: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorates an ``__init__`` whose ``**settings`` are :class:`Arguments`: they, too, may be given by position.

    Code written for the original modules does that. The fields of :class:`Settings` come in ``order``, behind the
    parameters that are positional anyway and in front of the keyword-only ones, and all of them have a place.
    """
    defaults, types = {field.name: field.default for field in fields(Settings)}, Settings.__annotations__
    assert sorted(order) == sorted(defaults), order

    def decorate(init: Callable[P, None]) -> Callable[P, None]:
        own = inspect.signature(init)
        parameters = [p for p in own.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        front = [p for p in parameters if p.kind is not Parameter.KEYWORD_ONLY]
        back = [p for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
        shared = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=defaults[name], annotation=types[name]) for name in order
        ]
        placed = [p.replace(kind=Parameter.POSITIONAL_OR_KEYWORD) for p in (*front, *shared, *back)]
        signature = own.replace(parameters=placed)

        @functools.wraps(init)
        def construct(*args: P.args, **kwargs: P.kwargs) -> None:
            arguments: dict[str, Any] = signature.bind(*args, **kwargs).arguments
            init(**arguments)  # type: ignore[call-arg]

        construct.__signature__ = signature  # type: ignore[attr-defined]
        return construct

    return decorate


if Settings.__doc__:  # python -OO has none
    offered = {name: record.by_share for name, record in SELECTIONS.items() if record.by_share}
    entries = {f"`{name}`": inspect.cleandoc(select.__doc__ or "") for name, select in offered.items()}
    Settings.__doc__ = Settings.__doc__.replace("(listed there as SELECTIONS)", listed(entries, " " * 12))
