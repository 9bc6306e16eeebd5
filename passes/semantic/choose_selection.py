"""Resolves ``selection="auto"``: looks at where the labels of the first batch are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from cggr_compile.options import FEW_LABELS, Options
from cggr_compile.passes.analysis.documents import documents
from cggr_compile.passes.analysis.positions import FirstBatch
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import (
    Candidates,
    FinalStates,
    Forward,
    LayerStack,
    LossSite,
    Padding,
    Slots,
    TokenValues,
)
from cggr_compile.passes.nodes import shape_of
from cggr_compile.passes.semantic.context_rows import context_distance, number_of
from cggr_compile.passes.semantic.final_entropy import final_entropy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.fx import GraphModule

# How often slots are doubled, where later batches need more.
DOUBLINGS = 2
# Slots of the fullest sequence for the highest entropies of the batch, in multiples of its share of them: some
# sequences have more than others.
SPREAD = 1.5
_SYMBOLIC = "the length of the sequences is symbolic"
# Options that importance can do, and labels cannot.
NEEDS_SCORES = {"min_tokens_ratio": "auto", "dynamic_threshold": True, "scope": "batch"}


class ChooseSelection(SemanticPass):
    """Settles which positions ``auto`` selects, and how many slots there are for them.

    ``labels``, without a router and (where there are layers) with context, where less than half of the first batch's
    positions have a label:
    slots for as many labels, and as much context, as its fullest sequence has, rounded up (:func:`rounded_up`). Where
    later batches have more, the slots are doubled (``ctx.growth``). Else ``importance``. Of several forwards the
    positions are counted together, and each has slots of its own. With ``top_entropy_quantile`` a share of the labels
    counts: which ones is not known yet.

    The graph stays as it is; what is chosen becomes its options.
    """

    name = "choose_selection"
    needs = (LossSite, FinalStates, Candidates)
    uses = (LayerStack, Forward, Padding, TokenValues)
    provides = (Slots,)
    analysis = True
    whole_graph = True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        options = ctx.options
        if options.selection != "auto":
            return PassResult(False, f"selection={options.selection!r} as asked")
        chosen, why = _choose(gm, ctx)
        if chosen is None:
            ctx.options = replace(options, selection="importance")
            ctx.notices.append(f"selection='auto' is 'importance' here: {why}")
            return PassResult(True, f"importance: {why}")
        ctx.options = labelled = _labelled(options)
        told: dict[str, None] = {}
        routed = ctx.level == "routed"
        for forward, own in zip(ctx.forwards, chosen, strict=True):
            with ctx.of(forward):
                ctx.add(own)
                length = shape_of(ctx[FinalStates].states)[1]
            told[f"{own.loss} of {length} slots carry loss" + (f", {own.gradient} gradient" if routed else "")] = None
        slots = "; ".join(told)
        context = f", with context {labelled.context_rows}" if routed else ""
        ctx.notices.append(f"selection='auto' is 'labels' here{context}: {why}; {slots}")
        numbers = [number for own in chosen for number in (own.loss, own.gradient)]
        return PassResult(True, f"labels: {why}; {slots}", {"slots": numbers})


def _labelled(options: Options) -> Options:
    """The options with ``labels`` for ``auto``; no scores are needed then."""
    return replace(options, selection="labels", scoring="random")


def _choose(gm: GraphModule, ctx: GraphContext) -> tuple[list[Slots] | None, str]:
    """The slots of ``labels``, of each forward, or None for ``importance``; and why."""
    for name, needs in NEEDS_SCORES.items():
        if getattr(ctx.options, name) == needs:
            return None, f"{name}={needs!r} needs scores"
    options = _labelled(ctx.options)
    own = _count(gm, ctx, options)
    found = own if ctx.first_batch is None else ctx.first_batch(own, _of_all)
    if isinstance(found, str):
        return None, found
    if len(found) != len(ctx.forwards):  # the model's first graph was another one
        found = [_of_one_forward(found)] * len(ctx.forwards)
    labels, positions = (sum(one[name] for one in found) for name in ("labels", "positions"))
    why = f"{labels / positions:.1%} of the first batch's positions have a label"
    if any(share < 1.0 for share in _entropy_shares(gm, ctx)):
        why += " and an entropy among the highest"
    if labels >= FEW_LABELS * positions:
        return None, why
    if not labels:
        return None, "no position of the first batch has a label"
    slots = []
    for number, forward in enumerate(ctx.forwards):
        with ctx.of(forward):
            length = shape_of(ctx[FinalStates].states)[1]
        if not isinstance(length, int):
            return None, _SYMBOLIC
        # a later batch of this process, of another shape, may need more
        known = [found[number], *([] if isinstance(own, str) else [own[number]])]
        needs = {name: max(one[name] for one in known) for name in ("loss", "gradient")}
        slots.append(_slots(ctx, options, length, needs))
    return slots, why


def _slots(ctx: GraphContext, options: Options, length: int, needs: dict[str, int]) -> Slots:
    most = length
    if options.max_selected is not None:
        most = number_of(length, options.most_gradient_slots)
    gradient = min(rounded_up(needs["gradient"], length) << ctx.growth, most)
    loss = min(rounded_up(needs["loss"], length) << ctx.growth, gradient)
    return Slots(loss, gradient, DOUBLINGS if gradient < most else 0)


def _count(gm: GraphModule, ctx: GraphContext, options: Options) -> list[dict[str, int]] | str:
    """Of the first batch, for each forward: ``positions``, and ``labels`` among them; the most labels (``loss``), and
    positions that carry ``gradient`` with them, of one sequence. Or why that is not known."""
    counted = []
    for forward, taken in zip(ctx.forwards, _entropy_shares(gm, ctx), strict=True):
        with ctx.of(forward):
            if not isinstance(shape_of(ctx[FinalStates].states)[1], int):
                return _SYMBOLIC
            labels = FirstBatch(gm, ctx).value(ctx[Candidates].valid)
        if isinstance(labels, str):
            return f"where the first batch has labels is not known: {labels}"
        most = int(labels.sum(1).max())
        loss = most if taken == 1.0 else min(most, math.ceil(SPREAD * taken * most))
        number = math.ceil(taken * int(labels.sum()))
        counted.append({"positions": labels.numel(), "labels": number, "loss": loss, "gradient": loss})
    few = 0 < sum(one["labels"] for one in counted) < FEW_LABELS * sum(one["positions"] for one in counted)
    wanted = few or ctx.first_batch is not None  # else nothing asks for its context
    reach = options.context_rows if wanted and ctx.level == "routed" else 0
    if not reach:
        return counted
    for forward, one in zip(ctx.forwards, counted, strict=True):
        with ctx.of(forward):
            rows = _with_context(gm, ctx, reach)
        if isinstance(rows, str):
            return f"how much context the first batch has is not known: {rows}"
        one["gradient"] = int(rows.sum(1).max())
    return counted


def _entropy_shares(gm: GraphModule, ctx: GraphContext) -> list[float]:
    """Of each forward the share of the labels that ``top_entropy_quantile`` leaves; 1.0 where it does nothing."""
    share, shares = ctx.options.top_entropy_quantile, []
    for forward in ctx.forwards:
        with ctx.of(forward):
            shares.append(share if share < 1.0 and not isinstance(final_entropy(gm.graph, ctx), str) else 1.0)
    return shares


def _of_all(counted: list[list[dict[str, int]] | str]) -> list[dict[str, int]] | str:
    """Of the first batches of all processes, as :func:`_count` gives it of one."""
    known = []
    for one in counted:
        if isinstance(one, str):
            return one
        known.append(one)
    if len({*map(len, known)}) > 1:
        return "the processes' graphs have different numbers of forwards"
    return [_of_one_forward(each) for each in zip(*known, strict=True)]


def _of_one_forward(each: Sequence[dict[str, int]]) -> dict[str, int]:
    together = {name: sum(one[name] for one in each) for name in ("positions", "labels")}
    return together | {name: max(one[name] for one in each) for name in ("loss", "gradient")}


def _with_context(gm: GraphModule, ctx: GraphContext, reach: int) -> Tensor | str:
    """bool [B, S]: which positions of the first batch would carry gradient; or why that is not known."""
    valid, anchor = ctx[Candidates].valid, ctx[Candidates].anchor
    told = documents(gm.graph, ctx)
    distance = FirstBatch(gm, ctx).computed(lambda emit: context_distance(emit, ctx, told, valid, reach), anchor)
    return distance if isinstance(distance, str) else distance <= reach


def rounded_up(most: int, length: int) -> int:
    """A number of slots for ``most`` positions: 1, 2, 3, 4, 6, 8, 12, 16, ... 64ths of the sequence.

    So that a batch with a few more than the first one finds slots, and few sizes are compiled.
    """
    unit = max(1, length // 64)
    wanted, step = -(-most // unit), 1
    while step < wanted:
        step = step + 1 if step < 4 else step * 3 // 2 if step & (step - 1) == 0 else step * 4 // 3
    return min(step * unit, length)
