"""Finds per-token values of the logits: log-probabilities, entropies, divergences, losses of single tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import Forward, LossSite, LoweredValues, NoSingleLoss, TokenValues
from cggr_compile.passes.nodes import op_name, shape_of
from cggr_compile.passes.patterns.head import read_head, returned_logits
from cggr_compile.passes.patterns.loss import NotALanguageModelLossError, scale_and_softcap
from cggr_compile.passes.patterns.token_values.classes import classes_of_values
from cggr_compile.passes.patterns.token_values.heads import head_input
from cggr_compile.passes.patterns.token_values.masks import own_masks, ways
from cggr_compile.passes.patterns.token_values.region import NoTokenValuesError, TokenRegion, find_region
from cggr_compile.passes.patterns.token_values.rules.head_values import is_head_of_values

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


class FindTokenValues(SemanticPass):
    """Records in ``ctx[TokenValues]`` where the vocabulary axis disappears, if the loss is no single cross-entropy.

    ``ctx[TokenRegion]`` has the plan of everything between, for the pass that writes it for the selected rows.

    In, for one::

        log_p = log_softmax(linear(hidden, lm_head)[:, :-1], -1)                     # [B, S - 1, V]
        chosen = log_p.gather(-1, labels[:, 1:, None])                               # [B, S - 1, 1], a value
        entropy = -(log_p.exp() * log_p).sum(-1)                                     # [B, S - 1], another
        loss = -(chosen.squeeze(-1) * mask).sum() / mask.sum() - 0.01 * (entropy * mask).mean()

    Everything between the hidden state and the values works position by position, so its gradient can be taken at
    some of the positions. What is computed of the values may be anything, here or outside of the graph.

    Positions are candidates where the gradient may be other than zero: where a target is not ignored, and where no
    reader multiplies the value with a mask that is zero, or replaces it; in doubt everywhere.
    """

    name = "find_token_values"
    uses = (Forward, LossSite, NoSingleLoss, LoweredValues)
    provides = (LossSite, TokenValues, TokenRegion)
    analysis = True

    def enabled(self, ctx: GraphContext) -> bool:
        return True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        if ctx.get(LossSite) is not None:
            return PassResult(False, "the loss is one cross-entropy")
        no_single = ctx[NoSingleLoss].refusal
        try:
            region = find_region(gm.graph, ctx.get(Forward))
            if region is None or not (region.values or region.splits):
                return no_single
            lowered = ctx.get(LoweredValues)
            site, found = _read(region, lowered, splits=ctx.dense and not ctx.observing)
            _check_returned(site, region)
        except NoTokenValuesError as why:
            return why.refusal
        ctx.add(site)
        ctx.add(found)
        ctx.add(region)
        return PassResult(True, _told(found), {"values": [str(node) for node in found.values]})


def _told(found: TokenValues) -> str:
    names = ", ".join(dict.fromkeys(op_name(node) for node in found.values))
    values = "one per-token value" if len(found.values) == 1 else f"{len(found.values)} per-token values"
    heads = f"head {found.heads[0]}" if len(found.heads) == 1 else f"{len(found.heads)} heads"
    where = "at any position" if found.everywhere else "where masks and labels let a gradient through"
    return f"{values} ({names}) of {heads}, differentiated {where}"


def _read(region: TokenRegion, lowered: LoweredValues | None, splits: bool) -> tuple[LossSite, TokenValues]:
    planner = region.planner
    main = [head for head in region.heads if planner.plan(head_input(head)).ref == planner.found[region.stem].ref]
    if not main:
        raise NoTokenValuesError(f"its heads ({region.heads[0]} is one) have layers of their own")
    if region.splits and not splits:
        raise NoTokenValuesError(f"it sums over logits and positions ({region.splits[0]})")
    values = (*region.values, *region.splits)
    layouts = tuple(planner.found[node].layout for node in region.values)
    everywhere = lowered.everywhere if lowered is not None else frozenset()
    masks = tuple(
        frozenset(way | own_masks(planner, node, everywhere) for way in ways(planner, node)) for node in region.values
    )
    labels = lowered.labels if lowered is not None else classes_of_values(region)
    weight, bias, transposed, scale, softcap = _read_head(region, main[0])
    site = LossSite(
        loss=values[0],
        head=main[0],
        weight=weight,
        bias=bias,
        transposed=transposed,
        hidden=region.stem,
        chain=region.logits,
        target=None,
        vocab=shape_of(weight)[1 if transposed else 0],
        start=0,
        scale=scale,
        softcap=softcap,
        reduction="none",
        ignore_index=-100,
        label_smoothing=0.0,
        values=values,
    )
    if region.splits:  # at ratio 1.0: nothing is selected
        layouts, masks = (), (frozenset({frozenset()}),)
    return site, TokenValues(
        region.stem,
        region.heads,
        tuple(region.layout(head) for head in region.heads),
        region.beside,
        region.values,
        layouts,
        masks,
        labels,
    )


def _read_head(region: TokenRegion, head: Node) -> tuple[Node, Node | None, bool, float, float]:
    """Weight, bias, whether the weight is transposed, scale and soft-cap of a head."""
    if is_head_of_values(head):
        _, weight, bias, *_ = head.args
        scale, softcap = head.args[7:9]
        return weight, bias, False, float(scale), float(softcap)  # type: ignore[arg-type,return-value]
    _, weight, bias, transposed = read_head(head)
    return weight, bias, transposed, *_scale_and_softcap(region, head)


def _scale_and_softcap(region: TokenRegion, head: Node) -> tuple[float, float]:
    """How the logits are made of the head's products, as far as the router's scores can follow it."""
    for node in region.logits:
        if op_name(node) in ("log_softmax", "softmax") or head in node.all_input_nodes:
            source: Any = node.all_input_nodes[0]
            try:
                if source is not head and source in region.logits:
                    return scale_and_softcap(source)
            except NotALanguageModelLossError:
                continue
    return 1.0, 0.0


def _check_returned(site: LossSite, region: TokenRegion) -> None:
    """Logits may leave the graph, without their gradient; nothing else that has an axis over the vocabulary."""
    same: set[Node] = set()
    for node in region.logits:
        if (node in region.heads and not is_head_of_values(node)) or _is_adapted(node, same, region):
            same |= returned_logits(replace(site, chain=(node,), vocab=shape_of(node)[-1]))
    for node in region.logits:
        if any(user.op == "output" for user in node.users) and node not in same:
            raise NoTokenValuesError(f"{op_name(node)!r} ({node}) is returned, with a gradient for every class")


def _is_adapted(node: Node, logits: set[Node], region: TokenRegion) -> bool:
    """Whether logits are a sum of others, or others times a weight: those of a head with an adapter."""
    parts = [n for n in node.all_input_nodes if n in region.planner.found]
    linear = op_name(node) in ("add", "sub") or (op_name(node) in ("mul", "div") and len(parts) == 1)
    return linear and bool(parts) and all(n in logits for n in parts)
