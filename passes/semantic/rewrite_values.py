"""Takes the gradient of per-token values at the selected rows; the values themselves stay exact at every position."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.ops.gradient_norms import gradient_norms_of
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import Candidates, FinalStates, Predictor, RowGradients, Selection, TokenValues
from cggr_compile.passes.fx import Emitter, descendants, place_behind
from cggr_compile.passes.nodes import fake_value, op_name, shape_of
from cggr_compile.passes.patterns.tail import copy_tail, gather_rows, rows_of
from cggr_compile.passes.patterns.token_values.layout import Layout
from cggr_compile.passes.patterns.token_values.program import Call, Ref
from cggr_compile.passes.patterns.token_values.region import TokenRegion
from cggr_compile.passes.patterns.token_values.row_writer import RowWriter
from cggr_compile.passes.patterns.token_values.rules.head_values import SQUARES, is_head_of_values, labels_of
from cggr_compile.passes.patterns.token_values.writer import as_before, tokens_first

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

# Values of ``cggr::token_log_probs`` that have a gradient.
PLACED = 5


class RewriteValues(SemanticPass):
    """Computes per-token values once more, of the selected rows, for their gradient.

    Before::

        logits = linear(norm(x), lm_head)[:, :-1]                                     # [B, S - 1, V]
        chosen = log_softmax(logits, -1).gather(-1, labels[:, 1:, None])             # [B, S - 1, 1]
        loss = -(chosen.squeeze(-1) * mask).sum() / mask.sum()

    After::

        h = cggr.gather_rows(x, rows, keep)                                           # [B, K, H]
        t = labels[arange(B)[:, None], (rows + 1).clamp(0, S - 1)]                    # [B, K]
        own = log_softmax(linear(norm(h), lm_head), -1).gather(2, t[:, :, None])      # [B, K, 1]
        ...                                                                           # as before, to chosen
        placed = cggr.place_values(chosen.detach().view(-1, 1), own, index, factors).view(B, S - 1, 1)
        loss = -(placed.squeeze(-1) * mask).sum() / mask.sum()

    ``index`` says where each row is among the positions, ``factors`` are the weights of those that are selected and
    have a position there. Loss and values are those of the graph as it was captured; the gradient of a value is taken
    at selected rows, times 1/p where they are sampled.

    The values of all positions cost a forward of the head, a third of what it costs densely, whatever part of the
    positions is selected; nothing of it is kept for the backward pass.

    Where the user, a library's head or ``lower_values`` calls ``cggr::token_log_probs``, nothing is computed twice::

        h = cggr.gather_rows(x, rows, keep)                                           # [B, K, H]
        exact = [value.detach() for value in token_log_probs(norm(x), lm_head, None, labels, ...)]
        placed = cggr.place_token_values(*exact, labels, norm(h), lm_head, None, index, factors, ...)

    and the rows may be selected by these values (``top_entropy``): then all of it stands behind the call.
    """

    name = "rewrite_values"
    needs = (FinalStates, Candidates, Selection)
    uses = (TokenValues, TokenRegion, Predictor)
    provides = (RowGradients,)

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        found = ctx.get(TokenValues)
        if found is None:
            return PassResult(False, "the loss is one cross-entropy")
        final, selection, anchor = ctx[FinalStates], ctx[Selection], ctx[Candidates].anchor
        region = ctx[TokenRegion]
        emit = Emitter(gm.graph, ctx.fake_mode)
        begin = place_behind(region.stem)
        if begin < anchor:  # rows are selected behind the head, or the head reads the states themselves
            begin = anchor
            with emit.before(begin, self.name):
                taken = rows_of(emit, final.states, selection)
                rows = copy_tail(emit, final, taken, in_place=False)[found.stem]
        else:
            readers = [*final.tail, *(node for node in gm.graph.nodes if node in final.states.users)]
            taken = gather_rows(emit, final.states, readers, selection, self.name)
            rows = copy_tail(emit, final, taken, in_place=True)[found.stem]
        writer = RowWriter(emit, begin, selection, rows, final.tail_start, self.name)
        details, learns = {"values": [str(node) for node in region.values]}, ctx.get(Predictor) is not None
        program = region.planner.program
        if (calls := _calls(region)) is not None:
            written = writer.write(program, list(calls.values()))
            for call, source in calls.items():
                norms = _place_call(emit, writer, call, region.layout(call), written[source], self.name, learns)
                if norms is not None:
                    ctx.add(RowGradients(norms))
            return PassResult(True, f"{len(region.values)} values of {', '.join(map(str, calls))}", details)
        inside = {*region.planner.found}
        refs = [region.planner.found[node].ref for node in region.values]
        logits = region.final_logits if learns else None
        further = [] if logits is None else [region.planner.found[logits].ref]
        written = writer.write(program, [*refs, *further])
        for node, ref in zip(region.values, refs, strict=True):
            self._place(emit, writer, node, region.layout(node), written[ref], inside, region)
        if logits is not None:
            ctx.add(RowGradients(_norms_of_rows(emit, written[further[0]], ctx[Candidates], selection, self.name)))
        return PassResult(True, f"{len(region.values)} values: {len(written)} steps on rows", details)

    def _place(
        self,
        emit: Emitter,
        writer: RowWriter,
        node: Node,
        layout: Layout,
        values: Node,
        inside: set[Node],
        region: TokenRegion,
    ) -> None:
        # not those on the way to further logits
        only = inside.__contains__
        readers = [user for user in node.users if descendants([user], only=only).isdisjoint(region.logits)]
        with emit.before(node.next, self.name):
            exact = tokens_first(emit, emit.method("detach", node), layout)
            index, factors = writer.places(layout.window)
            if fake_value(values).dtype != fake_value(node).dtype:
                values = emit.method("to", values, fake_value(node).dtype)
            placed = emit.call(torch.ops.cggr.place_values.default, exact, values, index, factors)
            placed = as_before(emit, placed, layout, shape_of(node))
        for user in readers:
            user.replace_input_with(node, placed)


def _calls(region: TokenRegion) -> dict[Node, Ref] | None:
    """Calls of ``cggr::token_log_probs`` that all values are computed from, and their hidden states.

    None where there are other heads, or logits; where rows of several calls, as of chunks, are those of one; and where
    what is trained beside the head has the gradient of the rows as well.
    """
    planner = region.planner
    refs = {planner.found[head].ref for head in region.heads}
    if region.logits or region.beside or len(refs) < len(region.heads):
        return None
    found: dict[Node, Ref] = {}
    for head in region.heads:
        step: Any = planner.program.steps[planner.found[head].ref.number]
        if not is_head_of_values(head) or not isinstance(step, Call):
            return None
        found[head] = step.args[0]
    return found


def _place_call(
    emit: Emitter, writer: RowWriter, call: Node, layout: Layout, hidden: Node, origin: str, learns: bool
) -> Node | None:
    """Let all that reads the values of a call read placed ones; if wanted, how large each row's gradient is, [B, K]."""
    readers = [user for user in call.users if op_name(user) == "getitem"]
    index, factors = writer.places(layout.window)
    _, weight, bias, *_ = call.args
    scale, softcap = call.args[7:9]
    place = call.next if writer.begin < call.next else writer.begin
    readers = [user for user in readers if not user < place]  # not what rows are selected by
    if learns:  # sums of squares are wanted
        call.update_arg(SQUARES, True)
        emit.changed(call)
    with emit.before(place, origin):
        exact = [emit.method("detach", emit.item(call, i)) for i in range(PLACED)]
        operands = (labels_of(call), hidden, weight, bias, index, factors, scale, softcap)
        placed = emit.call(torch.ops.cggr.place_token_values.default, *exact, *operands)
        values = [emit.item(placed, i) for i in range(PLACED)]
        norms = _norms_of_values(emit, exact[0], exact[3], index) if learns else None
    for reader in readers:
        if reader.args[1] in range(PLACED):
            reader.replace_all_uses_with(values[reader.args[1]])  # type: ignore[index]
            emit.graph.erase_node(reader)
    return norms


def _norms_of_values(emit: Emitter, log_prob: Node, log_squares: Node, index: Node) -> Node:
    """How large the gradient of every row is, [B, K], from values of all positions, and where the rows' are."""
    own, squares = (emit.call(operator.getitem, emit.method("flatten", v), index) for v in (log_prob, log_squares))
    return emit.node(gradient_norms_of(emit.proxy(own), emit.proxy(squares)))


def _norms_of_rows(emit: Emitter, logits: Node, candidates: Candidates, selection: Selection, origin: str) -> Node:
    """The same from the logits of the rows, [B, K, V]."""
    with emit.before(logits.next, origin):
        labels = emit.call(torch.gather, candidates.target, 1, selection.rows)
        return emit.call(torch.ops.cggr.gradient_norms.default, emit.method("detach", logits), labels)
