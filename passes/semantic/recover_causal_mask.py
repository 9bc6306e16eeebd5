"""Recover ``is_causal`` from the dense masks that models build, and find out which positions are padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from cggr_compile.passes.analysis.example_target import example_target
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import Attention, FinalStates, LayerStack, LossSite, Outputs, Padding, TokenValues
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value, shape_of
from cggr_compile.passes.patterns.mask_kinds import MaskKind, classify
from cggr_compile.passes.semantic.value_candidates import candidates_of_first_batch

aten = torch.ops.aten

# Inductor writes this text into C++ and Triton source: no double quotes.
NOT_RIGHT_PADDED = (
    "cggr: attention_mask is not right-padded (ones, then zeros), but this graph was compiled to use causal attention "
    "without it; compile with options={'padding': 'any'}"
)


class RecoverCausalMask(SemanticPass):
    """Replaces a mask tensor by ``is_causal=True`` where both mean the same, and records the padding.

    The nodes that build a mask are run on the CPU and the result is looked at, so it does not matter how a
    model writes it. Before::

        q, kv = torch.arange(S)[:, None], torch.arange(S)[None]          # int64 [S, 1], [1, S]
        mask = (kv <= q) & attention_mask.bool()[:, None, None, :]       # bool [B, 1, S, S]
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask)        # [B, heads, S, d]

    after, for right padding::

        real = attention_mask != 0                                       # bool [B, S]
        right = real == (torch.arange(S) < real.sum(1, keepdim=True))
        torch._assert_async(right.all(), "... not right-padded ...")
        y = scaled_dot_product_attention(q, k, v, is_causal=True)

    With right padding the two differ only in rows of padding, and no real token attends to those. So this is exact for
    the loss and its gradients as long as padding has no label, which ``check_labels`` asserts, and nothing but the
    cross-entropy reads these rows. Otherwise such a mask is kept, as it is at ratio 1.0. A sliding window is recovered
    where it does not cut anything off. With symbolic sizes the mask is looked at for several lengths, one of them
    longer than every number in the mask's nodes.
    """

    name = "recover_causal_mask"
    level = "routed"
    needs = (LossSite, LayerStack, FinalStates, Outputs)
    uses = (TokenValues,)
    provides = (LayerStack, Padding)
    optional = True

    def enabled(self, ctx: GraphContext) -> bool:
        return True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        groups: dict[Node, list[tuple[int, Attention]]] = {}
        for layer, block in enumerate(ctx[LayerStack].blocks):
            for attention in block.attentions:
                if attention.mask is not None:
                    groups.setdefault(attention.mask, []).append((layer, attention))
        if not groups:
            ctx.add(Padding())
            return PassResult(False, "nothing to do: no mask tensor", {"masks": [], "padding": None})

        rewritten: set[Node] = set()
        guards: dict[Node, bool] = {}
        masks = []
        padding: Node | None = None
        for mask, users in groups.items():
            attentions = [attention for _, attention in users]
            kind = classify(mask, attentions)
            padding = padding or kind.padding
            obstacle = _obstacle(kind, attentions, gm, ctx)
            if not obstacle:
                for attention in attentions:
                    _use_is_causal(attention.node)
                if kind.padding is not None:
                    guards[kind.padding] = guards.get(kind.padding, False) or kind.binary
                rewritten.update(attention.node for attention in attentions)
            masks.append(
                {
                    "mask": mask.name,
                    "kind": kind.name,
                    "layers": sorted({layer for layer, _ in users}),
                    "rewritten": not obstacle,
                    "reason": obstacle or "is_causal=True means the same",
                }
            )
        for unmasked, binary in guards.items():
            _assert_right_padded(gm, ctx, unmasked, binary)
        ctx.add(Padding(padding, tuple(guards)))
        ctx.add(_without_masks(ctx[LayerStack], rewritten))

        details: dict[str, Any] = {"masks": masks, "padding": _name(padding)}
        if rewritten:
            return PassResult(
                True, f"{len(rewritten)} of {len(ctx[LayerStack].attentions)} attentions use is_causal", details
            )
        return PassResult(False, "; ".join(dict.fromkeys(f"{m['mask']}: {m['reason']}" for m in masks)), details)


def _obstacle(kind: MaskKind, attentions: list[Attention], gm: GraphModule, ctx: GraphContext) -> str:
    """Why the mask must stay; empty if it need not."""
    if not kind.causal:
        return kind.reason
    if any(attention.kind != "sdpa" for attention in attentions):
        return "this attention is written without scaled_dot_product_attention"
    if kind.padding is None:
        return ""
    if ctx.dense:
        return "with min_tokens_ratio=1.0 rows of padding count too"
    if ctx.options.padding == "any":
        return "padding='any' promises nothing about where padding is"
    if ctx[Outputs].every_position:
        return "an output, or a part of the loss besides the cross-entropy, reads rows of padding too"
    if ctx.options.padding == "right":
        return ""
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    example = ctx.example_inputs[placeholders.index(kind.padding)]
    return _example_obstacle(example, kind.binary) or _label_obstacle(example == 0, gm, ctx)


def _example_obstacle(example: Any, binary: bool) -> str:
    if type(example) is not torch.Tensor or example.is_meta:
        return "padding='auto' needs a real first batch to decide from"
    real = example != 0
    if not bool((real[:, 1:] <= real[:, :-1]).all()):
        return "the first batch is not right-padded"
    if binary and not bool((example == real).all()):
        return "the first batch's padding mask holds more than zeros and ones"
    return ""


def _label_obstacle(padded: torch.Tensor, gm: GraphModule, ctx: GraphContext) -> str:
    """``padded``: bool [B, S]."""
    if ctx.get(TokenValues) is not None:
        found = candidates_of_first_batch(gm, ctx)
        if isinstance(found, str):
            return f"whether padding has a gradient is not known: {found}"
        return "padding has a gradient in the first batch" if bool((found & padded.cpu()).any()) else ""
    target = example_target(gm, ctx)
    if target is None:
        return "whether padding has labels can be told only by running the model"
    start = ctx[FinalStates].tail_start + ctx[LossSite].start
    labelled = target.reshape(len(padded), -1) != ctx[LossSite].ignore_index
    if bool((labelled & padded.cpu()[:, start : start + labelled.shape[1]]).any()):
        return "padding has labels in the first batch"
    return ""


def _use_is_causal(node: Node) -> None:
    """Replace attn_mask by is_causal in scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, ...)."""
    if len(node.args) > 3:
        node.update_arg(3, None)
    else:
        node.update_kwarg("attn_mask", None)
    if len(node.args) > 5:
        node.update_arg(5, True)
    else:
        node.update_kwarg("is_causal", True)


def _assert_right_padded(gm: GraphModule, ctx: GraphContext, padding: Node, binary: bool) -> None:
    """A check on the device, without a host synchronisation, that every row is ones and then zeros."""
    anchor = list(gm.graph.find_nodes(op="placeholder"))[-1].next
    with Emitter(gm.graph, ctx.fake_mode).before(anchor, RecoverCausalMask.name) as emit:
        length = shape_of(padding)[1]
        if isinstance(length, torch.SymInt):
            length = emit.call(aten.sym_size.int, padding, 1)
        real = emit.call(aten.ne.Scalar, padding, 0)
        positions = emit.call(aten.arange.default, length, device=fake_value(padding).device)
        count = emit.call(aten.sum.dim_IntList, real, [1], True)
        # comparing slices of one less than S would guard against S == 2
        right = emit.call(
            aten.all.default, emit.call(aten.eq.Tensor, real, emit.call(aten.lt.Tensor, positions, count))
        )
        if binary:
            zero_or_one = emit.call(aten.all.default, emit.call(aten.eq.Tensor, padding, real))
            right = emit.call(aten.logical_and.default, right, zero_or_one)
        emit.call(aten._assert_async.msg, right, NOT_RIGHT_PADDED)


def _without_masks(stack: LayerStack, calls: set[Node]) -> LayerStack:
    def without(attention: Attention) -> Attention:
        return replace(attention, mask=None) if attention.node in calls else attention

    blocks = (replace(block, attentions=tuple(map(without, block.attentions))) for block in stack.blocks)
    return replace(stack, blocks=tuple(blocks))


def _name(node: Node | None) -> str | None:
    return None if node is None else node.name
