"""Which rows carry gradient where they are more than the selected ones: trained inputs' positions, and context."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.analysis.documents import Documents, documents, real_tokens
from cggr_compile.passes.analysis.positions import union
from cggr_compile.passes.base import GraphContext
from cggr_compile.passes.facts import ExtraRows, GradientRows, Routing, Slots
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value, shape_of

if TYPE_CHECKING:
    from torch.fx import Node

ops = torch.ops.cggr


@dataclass(frozen=True)
class MoreRows:
    """What was emitted.

    Attributes:
        rows: None where the selected rows are all that carry gradient; then there are no counts.
        counts: int64 [3], see ``cggr::gradient_rows``.
        text: what to add to the reason of the selection.
    """

    rows: GradientRows | None = None
    counts: tuple[Node, ...] = ()
    text: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def more_rows(
    emit: Emitter, ctx: GraphContext, selected: tuple[Node, Node, Node], loss_slots: int | Node, slots: Slots
) -> MoreRows:
    """Emit the gradient rows of a selection, behind it.

    Args:
        selected: the selection as a mask, bool [B, S], and packed, ``rows`` and ``keep`` [B, K].
        loss_slots: K.
    """
    mask, rows, keep = selected
    trained = ctx.get(ExtraRows)
    reach = ctx.options.context_rows if ctx[Routing].gradient == "routed" else 0
    if not reach and trained is None:
        return MoreRows()
    batch, length = emit.size(mask, 0), emit.size(mask, 1)
    extra, distance, wanted = None, None, loss_slots
    text, details = "", dict[str, Any]()
    if reach:
        distance, text, details = _context(emit, ctx, mask, reach)
        wanted = emit.integer(torch.sym_max, wanted, share_of(emit, length, slots.gradient))
    if trained is not None:
        # what the regions depend on stands in front of the first block: the embeddings are made with it
        extra = union(emit, trained.regions, batch, length, fake_value(mask).device)
        wanted = emit.integer(operator.add, wanted, trained.most)
    wanted = emit.integer(torch.sym_min, wanted, length)
    found = emit.call(ops.gradient_rows.default, rows, keep, extra, distance, wanted, length)
    packed, kept, places, counts = (emit.item(found, i) for i in range(4))
    details["gradient_slots"] = str(shape_of(packed)[1])
    return MoreRows(GradientRows(packed, kept, places, extra), (counts,), text, details)


def _context(emit: Emitter, ctx: GraphContext, mask: Node, reach: int) -> tuple[Node, str, dict[str, Any]]:
    """The distance of every position to the row that it is context of, and how that is told."""
    told = documents(emit.graph, ctx)
    distance = context_distance(emit, ctx, told, mask, reach)
    text, names = f", context {reach}", told.names
    if names:
        text += f" inside of documents ({', '.join(names[:2])}{' and more' if len(names) > 2 else ''})"
    if told.unread:
        text += f"; it may reach into another document: {told.unread} cannot be read"
    return distance, text, {"context": reach, "documents": names}


def context_distance(emit: Emitter, ctx: GraphContext, told: Documents, mask: Node, reach: int) -> Node:
    """Emit how far every position is in front of the next one of ``mask``: see ``cggr::context_distance``."""
    padding, real = real_tokens(emit.graph, ctx), None
    if padding is not None:
        real = padding if fake_value(padding).dtype == torch.bool else emit.call(operator.ne, padding, 0)
    return emit.call(ops.context_distance.default, mask, told.starts(emit), real, reach)


def number_of(length: int, share: Fraction | int) -> int:
    """A number of positions, at most ``length``: rounded up where it is a share of it."""
    return min(share, length) if isinstance(share, int) else math.ceil(share * length)


def share_of(emit: Emitter, length: int | Node, share: Fraction | int) -> int | Node:
    """:func:`number_of`, for a length that may be symbolic."""
    if isinstance(length, int):
        return number_of(length, share)
    if isinstance(share, int):
        return emit.integer(torch.sym_min, share, length)
    scaled = emit.integer(operator.mul, length, share.numerator)
    return emit.integer(operator.floordiv, emit.integer(operator.add, scaled, share.denominator - 1), share.denominator)
