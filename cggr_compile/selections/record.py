"""What a selection says of itself, and what it is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

_ROUNDING = 1e-3  # of ratio * count in float32: ceil(0.1 * 30) is 3

Scope = Literal["sequence", "batch"]


class SelectionOptions(Protocol):
    """Options that belong to some selections; see :class:`cggr_compile.Options`."""

    @property
    def num_strata(self) -> int: ...

    @property
    def min_tokens_per_sequence(self) -> int: ...


class SlotOptions(SelectionOptions, Protocol):
    """Those of the backend."""

    @property
    def span(self) -> int: ...


class Request(Protocol):
    """What every selection is asked, by the backend and by the modules.

    The backend asks once per graph: its tensors are ``torch.fx`` proxies, on which operators, functions of torch and
    methods can be called, but whose sizes and dtypes are unknown. Its numbers are ints, and proxies where sizes are
    symbolic.

    Attributes:
        scores: difficulty, float32 [B, S]. None where there is none or the selection does not use it.
        valid: bool [B, S], the candidates.
        state: int64 [2], (seed, step), seeds what is random: see ``cggr::uniform``.
        number: how many tokens of a sequence to select, if it has so many candidates: an int, or int64 [B, 1].
        options: the options.
    """

    @property
    def scores(self) -> Tensor | None: ...

    @property
    def valid(self) -> Tensor: ...

    @property
    def state(self) -> Tensor: ...

    @property
    def number(self) -> int | Tensor: ...

    @property
    def options(self) -> SelectionOptions: ...


@dataclass(frozen=True)
class SlotRequest:
    """What the backend asks: a static number of slots per sequence. See :class:`Request`.

    Attributes:
        slots: K, of every sequence; no more may be selected.
        budget: slots of a sequence on average, at most K; less than K where sequences compete (``whole_batch``).
    """

    scores: Tensor | None
    valid: Tensor
    state: Tensor
    slots: int
    budget: int
    whole_batch: bool
    options: SlotOptions

    @property
    def number(self) -> int:
        return self.slots


@dataclass(frozen=True)
class ShareRequest:
    """What the modules ask: a share that changes from step to step, and so is a tensor. See :class:`Request`.

    Attributes:
        ratio: float32 [], share of the candidates in (0, 1].
        step: int64 [].
    """

    scores: Tensor
    valid: Tensor
    ratio: Tensor
    step: Tensor
    options: SelectionOptions

    @property
    def state(self) -> Tensor:
        return torch.stack((torch.zeros_like(self.step), self.step))

    @property
    def number(self) -> Tensor:
        return self.quota(self.valid.sum(1, keepdim=True))

    def quota(self, count: Tensor) -> Tensor:
        """The share of ``count`` candidates, int64, rounded up: at least 1, at most ``count``."""
        wanted = torch.ceil(self.ratio * count - _ROUNDING).long().clamp(min=1)
        return torch.minimum(wanted, count)


# the selected tokens, bool [B, S], and every candidate's probability to be one, float32 [B, S], if it samples
Selected = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A selection: which tokens the loss is taken over, and what each of them weighs.

    Attributes:
        name: as the option ``selection`` takes it.
        doc: which tokens it takes, in one phrase (Markdown).
        scores: ``needed`` if it ranks by them; ``used`` if it can do without; ``unused``: they only feed the metrics.
        sampled: whether it draws at random with known probabilities p, so that losses have the weight 1/p. Without,
            the sample is biased, and users are told so.
        scopes: whether it looks at one sequence or at the whole batch; both where the option ``scope`` decides.
        takes_all: whether it takes every candidate that finds a slot; what finds none is counted.
        follows_confidence: False for a share that the modules' ``dynamic_threshold`` leaves alone.
        options: names of options that belong to it.
        by_slots: selects for the backend, with operators that a graph can hold: without a branch on data, and with no
            more tokens of a sequence than slots.
        by_share: selects for the modules; None if they do not offer it. One function of a :class:`Request` can be both.
    """

    name: str
    doc: str
    scores: Literal["needed", "used", "unused"]
    sampled: bool
    by_slots: Callable[[SlotRequest], Selected]
    by_share: Callable[[ShareRequest], Selected] | None = None
    scopes: tuple[Scope, ...] = ("sequence",)
    takes_all: bool = False
    follows_confidence: bool = True
    options: tuple[str, ...] = ()

    @property
    def in_modules(self) -> bool:
        return self.by_share is not None

    @property
    def cells(self) -> dict[str, str]:
        return {
            "selection": f"`{self.name}`",
            "which tokens": self.doc,
            "weight of a token's loss": "1/p" if self.sampled else "none",
            "scope": " or ".join(f"`{scope}`" for scope in self.scopes),
            "its options": ", ".join(f"`{name}`" for name in self.options),
            "modules": "yes" if self.in_modules else "",
        }
