"""The arguments that the loss, the scorer and the model share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from cggr_compile.options import OptionError, _check_choice, _check_integer, _check_ratio, _check_share

Scoring = Literal["entropy", "margin", "loss", "combined"]
Selection = Literal["topk", "stratified", "sequence_aware", "fixed_quota"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How tokens are scored and how many of which are selected.

    Attributes:
        scoring: difficulty from the distribution p: ``entropy`` H(p) - p_top1, ``margin`` 1 - (p_top1 - p_top2),
            ``loss`` -log p(label), ``combined`` their sum.
        selection: ``topk`` the most difficult tokens of every sequence, of each the same share; ``fixed_quota`` the
            same, with a share that ``dynamic_threshold`` leaves alone; ``sequence_aware`` the most difficult ones of
            the batch, and at least ``min_tokens_per_sequence`` of every sequence; ``stratified`` the same share of each
            of ``num_strata`` groups of similar difficulty, at random inside a group. The first three mean what they
            mean in :class:`cggr_compile.Options`.
        dynamic_threshold, threshold_sensitivity: see :func:`cggr_compile.modules.schedule.adjust_to_confidence`.
        min_tokens_ratio, warmup_steps: see :func:`cggr_compile.modules.schedule.curriculum_ratio`.

    Raises:
        ValueError: for a value out of range; it names the argument.
    """

    scoring: Scoring = "combined"
    selection: Selection = "topk"
    dynamic_threshold: bool = True
    threshold_sensitivity: float = 0.5
    min_tokens_ratio: float = 0.25
    warmup_steps: int = 1000
    num_strata: int = 4
    min_tokens_per_sequence: int = 1

    def __post_init__(self) -> None:
        _check_choice("scoring", self.scoring, get_args(Scoring))
        _check_choice("selection", self.selection, get_args(Selection))
        if not isinstance(self.dynamic_threshold, bool):
            raise OptionError(f"dynamic_threshold must be True or False, got {self.dynamic_threshold!r}")
        _check_share("threshold_sensitivity", self.threshold_sensitivity)
        _check_ratio("min_tokens_ratio", self.min_tokens_ratio)
        for name, least in (("warmup_steps", 0), ("num_strata", 1), ("min_tokens_per_sequence", 1)):
            _check_integer(name, getattr(self, name), least)
