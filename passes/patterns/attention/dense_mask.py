"""Masks with an entry for every query and key: which keys just before their own the queries see."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from cggr_compile.passes.nodes import fake_value, same_size, shape_of
from cggr_compile.passes.patterns.attention.base import Hides
from cggr_compile.passes.patterns.mask_kinds import BLOCKED

if TYPE_CHECKING:
    from cggr_compile.passes.fx import Emitter


@dataclass(frozen=True)
class DenseMasks(Hides):
    """Masks that apply together to the scores [B, ..., S, S] of an attention.

    Attributes:
        masks: broadcastable to the scores: bool, or added to them.
        hidden: of each, whether True hides a key; False where it shows it, and for one that is added.
        rank: the number of axes of the scores, >= 3.
    """

    masks: tuple[Node, ...]
    hidden: tuple[bool, ...]
    rank: int

    @property
    def inputs(self) -> tuple[Node, ...]:
        return self.masks

    def previous(self, emit: Emitter) -> Node:
        found = [self._seen(emit, *pair) for pair in zip(self.masks, self.hidden, strict=True)]
        seen = found[0]
        for other in found[1:]:
            seen = emit.call(operator.and_, seen, other)
        return seen

    def _seen(self, emit: Emitter, mask: Node, hidden: bool) -> Node:
        shape = shape_of(mask)
        if len(shape) < self.rank:
            mask = emit.call(operator.getitem, mask, (*[None] * (self.rank - len(shape)), ...))
        if same_size(shape[-2], 1):  # the same keys for every query
            mask = emit.call(operator.getitem, emit.method("select", mask, -2, 0), (..., slice(None, -1)))
        elif same_size(shape[-1], 1):  # all keys or none
            mask = emit.call(operator.getitem, emit.method("select", mask, -1, 0), (..., slice(1, None)))
        else:
            mask = emit.method("diagonal", mask, -1, -2, -1)  # [..., S - 1]
        if fake_value(mask).dtype != torch.bool:
            mask = emit.call(operator.gt, mask, BLOCKED)
        elif hidden:
            mask = emit.call(torch.logical_not, mask)
        if self.rank > 3:
            mask = emit.method("any", emit.method("flatten", mask, 1, -2), 1)
        return emit.call(torch.nn.functional.pad, mask, (1, 0), "constant", True)
