"""What a scoring says of itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

# what the router says of every position's distribution p, see cggr::score
STATISTICS = ("logsumexp", "entropy", "top1", "top2", "label_logprob")
# what else a formula may read, in the backend: the logsumexp of twice the logits (a second product of the head), and
# the loss of another model, an input of the graph
FURTHER = ("doubled", "reference_loss")


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A scoring: the difficulty of a token as a formula.

    Attributes:
        name: as the option ``scoring`` takes it.
        doc: the difficulty in one phrase (Markdown).
        formula: from float32 tensors of one shape, to one. It takes what it reads by name: of STATISTICS and FURTHER.
            None for a scoring that no head computes.
        predicted: whether a network that is trained beside the model predicts the difficulty (``cggr::predict``).

    Raises:
        ValueError: for a formula that reads something else.
    """

    name: str
    doc: str
    formula: Callable[..., Tensor] | None
    predicted: bool = False

    def __post_init__(self) -> None:
        known = (*STATISTICS, *FURTHER)
        if unknown := [name for name in self.inputs if name not in known]:
            raise ValueError(f"formula of {self.name!r} must take some of {list(known)}, it takes {unknown}")

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """What the formula reads."""
        return () if self.formula is None else tuple(inspect.signature(self.formula).parameters)

    @property
    def reads_head(self) -> bool:
        """Whether the router runs final norm and head, and so knows how sure the model is of every token."""
        return self.formula is not None

    @property
    def needs_router(self) -> bool:
        return self.reads_head or self.predicted

    @property
    def in_modules(self) -> bool:
        """Whether the modules, which have the router's logits and nothing else, can compute it."""
        return self.reads_head and not set(self.inputs) & set(FURTHER)

    @property
    def cells(self) -> dict[str, str]:
        return {
            "scoring": f"`{self.name}`",
            "difficulty of a token": self.doc,
            "computed from": ", ".join(f"`{name}`" for name in self.inputs),
            "modules": "yes" if self.in_modules else "",
        }
