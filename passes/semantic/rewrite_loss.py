"""Rewrites head and cross-entropy to run on the selected rows only."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import (
    Candidates,
    FinalStates,
    LossSite,
    Predictor,
    RowGradients,
    RowTail,
    Selection,
    TokenValues,
)
from cggr_compile.passes.fx import Emitter, layout_only
from cggr_compile.passes.nodes import fake_value, op_name
from cggr_compile.passes.patterns.tail import copy_rows, copy_tail, gather_rows

if TYPE_CHECKING:
    from torch.fx import GraphModule


class RewriteLoss(SemanticPass):
    """Gathers the hidden states before final norm and head, and takes the loss over those rows.

    Before::

        loss = cross_entropy(linear(norm(x), lm_head).float().view(-1, V), labels)

    After::

        h = cggr.gather_rows(x, rows, keep)                                  # [B, K, H]
        t = where(keep, target.gather(1, rows), -100)                        # [B, K]
        each = cross_entropy(linear(norm(h), lm_head).float().flatten(0, 1), t.flatten(), reduction="none")
        loss = (each * weights.flatten()).sum() / valid.sum().clamp(min=1)

    The weighted sum stands for the sum over all candidates (``cggr::row_weights``). ``mean`` divides it by their
    number; ``sum``, which the user divides by a count of his own (gradient accumulation), does not. Without any
    candidate the loss is zero, with zero gradients.

    Where more rows carry gradient than are selected, those are what is gathered, and the loss takes its own of them::

        h = cggr.gather_rows(x, gradient_rows, gradient_keep)                # [B, G, H]
        h = h.gather(1, places[:, :, None].expand(-1, -1, H))                # [B, K, H]

    Where ``shorten_last_block`` has found that part of the last block may run on rows, rows are gathered in front of
    that. With ``cross_entropy="fused"`` the head and everything behind it are one operator, and the logits of the rows
    are not kept::

        each, _, _ = cggr.linear_cross_entropy(norm(h).flatten(0, 1), lm_head, None, t.flatten(), 1.0, 0.0, 0.0)

    Where a predictor learns from them, or the schedule goes by them, the norms of the rows' gradients are computed
    besides::

        g = cggr.gradient_norms(linear(norm(h), lm_head).detach().flatten(0, 1), t.flatten())
    """

    name = "rewrite_loss"
    needs = (LossSite, FinalStates, Candidates, Selection)
    uses = (RowTail, TokenValues, Predictor)
    provides = (RowGradients,)

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        if ctx.get(TokenValues) is not None:
            return PassResult(False, "the loss is computed from per-token values")
        final, loss, candidates, selection = ctx[FinalStates], ctx[LossSite], ctx[Candidates], ctx[Selection]
        emit = Emitter(gm.graph, ctx.fake_mode)
        last, tail = final.states, ctx.get(RowTail)
        entries, inside = (tail.entries, tail.nodes) if tail else ((last,), ())
        readers = [*inside, *final.tail, loss.head]
        taken = {entry: gather_rows(emit, entry, readers, selection, self.name) for entry in entries}
        taken |= copy_rows(emit, inside, taken)
        mapping = copy_tail(emit, final, taken[last], in_place=True)
        dtype = fake_value(loss.loss).dtype
        fused = ctx.options.cross_entropy == "fused"
        wanted = ctx.get(Predictor) is not None or ctx.measured
        logits = None if fused else self._copy_chain(emit, loss, mapping)
        # a fused head reads its weights where the head does: a write, or another autocast, may come after it
        with emit.before(loss.loss if logits is not None else loss.head, self.name):
            target = emit.call(torch.gather, candidates.target, 1, selection.rows)
            target = emit.call(torch.where, selection.keep, target, loss.ignore_index)
            norms = None
            if logits is None:
                each, norms = _fused(emit, loss, mapping[loss.hidden], emit.method("flatten", target), wanted)
            else:
                if wanted:
                    norms = _norms(emit, logits, target, selection)
                if dtype in (torch.float16, torch.bfloat16):
                    logits = emit.method("float", logits)  # a sum over thousands of tokens does not fit
                each = emit.call(
                    torch.nn.functional.cross_entropy,
                    emit.method("flatten", logits, 0, 1),
                    emit.method("flatten", target),
                    ignore_index=loss.ignore_index,
                    reduction="none",
                    label_smoothing=loss.label_smoothing,
                )
            value = emit.method("sum", emit.call(operator.mul, each, emit.method("flatten", selection.weights)))
            total = emit.method("sum", candidates.valid)
            if loss.reduction == "mean":
                value = emit.call(operator.truediv, value, emit.method("clamp", total, min=1))
            else:
                self._guard_user_count(emit, loss.loss, total)
            if fake_value(value).dtype != dtype:
                value = emit.method("to", value, dtype)
            if norms is not None:
                ctx.add(RowGradients(emit.method("view_as", norms, selection.rows)))
        loss.loss.replace_all_uses_with(value)
        gm.graph.erase_node(loss.loss)
        how = "from their logits" if logits is not None else "fused with the head: no logits"
        details = {"rows": str(selection.rows), "cross_entropy": ctx.options.cross_entropy}
        return PassResult(True, f"{loss.reduction} over the selected rows, {how}", details)

    def _copy_chain(self, emit: Emitter, loss: LossSite, mapping: dict[Node, Node]) -> Node:
        """The logits of the selected rows, [B, K, V]."""
        for node in loss.chain:
            source = next((n for n in node.all_input_nodes if n in mapping), loss.hidden)
            if node is not loss.head and (layout_only(node) or op_name(node) in _LAYOUT):
                mapping[node] = mapping[source]
                continue
            with emit.before(node, self.name):
                mapping[node] = emit.copy(node, mapping)
        return mapping[loss.chain[-1]]

    def _guard_user_count(self, emit: Emitter, loss: Node, total: Node) -> None:
        """The user's own count may be zero where no token has a label: 0 / 0 becomes 0 / 1."""
        for user in list(loss.users):
            divisor: Any = user.args[1] if op_name(user) == "div" and user.args[0] is loss else None
            if isinstance(divisor, Node) and isinstance(fake_value(divisor), torch.Tensor):
                with emit.before(user, self.name):
                    some = emit.call(operator.gt, total, 0)
                    user.replace_input_with(divisor, emit.call(torch.where, some, divisor, 1))


def _norms(emit: Emitter, logits: Node, target: Node, selection: Selection) -> Node:
    """How large the gradient of every row's loss is, [B, K], of logits [B, K, V] or [B * K, V]."""
    whole = emit.method("detach", emit.method("flatten", logits, 0, -2))
    labels = emit.call(torch.where, selection.keep, target, NO_LABEL)
    return emit.call(torch.ops.cggr.gradient_norms.default, whole, emit.method("flatten", labels))


def _fused(emit: Emitter, loss: LossSite, hidden: Node, target: Node, norms: bool) -> tuple[Node, Node | None]:
    """The loss of every row of ``hidden`` [B, K, H] without logits, and, if wanted, how large its gradient is.

    ``target``: int64 [B * K].
    """
    weight = emit.method("t", loss.weight) if loss.transposed else loss.weight
    labelled = emit.call(operator.ne, target, loss.ignore_index)
    dtype = fake_value(loss.head).dtype  # autocast's, where the head runs under it
    operands = [
        node if node is None or fake_value(node).dtype == dtype else emit.method("to", node, dtype)
        for node in (emit.method("flatten", hidden, 0, 1), weight, loss.bias)
    ]
    labels = emit.call(torch.where, labelled, target, NO_LABEL)
    numbers = loss.scale, loss.softcap, loss.label_smoothing
    found = emit.call(torch.ops.cggr.linear_cross_entropy.default, *operands, labels, *numbers, norms)
    return emit.item(found, 0), emit.item(found, 2) if norms else None


NO_LABEL = -100
_LAYOUT = {"getitem", "transpose", "swapaxes", "permute", "mT"}
